"""Which architectures keep packed examples apart, and norms that must not move in training."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from rankfit.tasks.lora import inject, set_training
from rankfit.tasks.model_sources import ModelError
from rankfit.tasks.packing import check_packing

VOCABULARY = 60
_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
APART: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, _LLAMA),
    "qwen2": (hf.Qwen2Config, _LLAMA),
    "mistral": (hf.MistralConfig, _LLAMA | {"sliding_window": 8}),
    "gpt2": (hf.GPT2Config, _GPT),
    "gpt-neox": (hf.GPTNeoXConfig, _COMMON | {"intermediate_size": 64}),
}
MIXED: dict[str, tuple[Any, dict[str, Any]]] = {
    "opt": (hf.OPTConfig, _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": (hf.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (hf.FalconConfig, _COMMON),
    "mpt": (hf.MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    "biogpt": (hf.BioGptConfig, _COMMON | {"intermediate_size": 64}),
    "xglm": (hf.XGLMConfig, {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
    "mamba": (hf.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "rwkv": (hf.RwkvConfig, {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}),
}


def model_of(config: Any, sizes: dict[str, Any], dtype: torch.dtype) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    made = config(vocab_size=VOCABULARY, use_cache=False, **sizes)
    return hf.AutoModelForCausalLM.from_config(
        made, attn_implementation="eager", dtype=dtype
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*APART, *MIXED])
def test_packing_is_allowed_only_where_examples_stay_apart(name: str, dtype: torch.dtype) -> None:
    model = model_of(*(APART | MIXED)[name], dtype)
    if name in APART:
        check_packing(model, 64)
        return
    with pytest.raises(ModelError, match=f"task.packing: {name} .*set task.packing=false"):
        check_packing(model, 64)


def test_running_statistics_stay_and_a_batch_of_one_trains() -> None:
    """ResNet: BatchNorm throughout; the adapter learns, no client moves the base."""
    config = hf.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3
    )
    torch.manual_seed(0)
    base = hf.ResNetForImageClassification(config).eval()
    base.classifier = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 3))
    base.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = inject(base, {"classifier.1": 2}, scale=1.0, dropout=0.0, heads=())
    set_training(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms) and model.training
    model(pixel_values=torch.rand(1, 1, 32, 32), labels=torch.tensor([0])).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    after = {n.replace(".base_layer", ""): t for n, t in base.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
