"""One tiny config of every architecture that the estimator is held to, and its step spec."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig

from rankfit.estimator.step_spec import InputSpec, StepSpec, canonical
from rankfit.tasks import base_model

IMAGE, TEXT = "image-classification", "text-classification"
CAUSAL, SEQ2SEQ = "causal-lm", "seq2seq-lm"
CLASSES = {"num_labels": 5, "problem_type": "single_label_classification"}

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = _ENCODER | {"vocab_size": 101, "max_position_embeddings": 40}
_VISION = _ENCODER | {"image_size": 16, "patch_size": 4}
#: Grouped-query attention: 4 heads, 2 key-value heads.
_DECODER = _TEXT | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _swin() -> PreTrainedConfig:
    return hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )


def _gpt2() -> PreTrainedConfig:
    return hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=101, n_positions=40)


def _opt() -> PreTrainedConfig:
    return hf.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=101,
        max_position_embeddings=40,
        word_embed_proj_dim=32,
    )


def _t5() -> PreTrainedConfig:
    return hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=101)


def _deberta() -> PreTrainedConfig:
    return hf.DebertaV2Config(
        **_TEXT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    )


#: transformers offers these no fused attention.
EAGER_ONLY = (
    "deberta-v2", "gemma2", "gpt-oss", "longformer", "mamba", "mamba2", "bloom", "mpt", "gpt-j",
)  # fmt: skip

#: Name → (task kind, config).
ARCHITECTURES: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "vit": (IMAGE, lambda: hf.ViTConfig(**_VISION)),
    "deit": (IMAGE, lambda: hf.DeiTConfig(**_VISION)),
    "swin": (IMAGE, _swin),
    "bert": (TEXT, lambda: hf.BertConfig(**_TEXT)),
    "roberta": (TEXT, lambda: hf.RobertaConfig(**_TEXT)),
    "deberta-v2": (TEXT, _deberta),
    "llama": (CAUSAL, lambda: hf.LlamaConfig(**_DECODER)),
    "llama-classifier": (TEXT, lambda: hf.LlamaConfig(**_DECODER)),
    "qwen2": (CAUSAL, lambda: hf.Qwen2Config(**_DECODER, tie_word_embeddings=True)),
    "qwen3": (CAUSAL, lambda: hf.Qwen3Config(**_DECODER)),
    "mistral": (CAUSAL, lambda: hf.MistralConfig(**_DECODER, sliding_window=8)),
    "gemma": (CAUSAL, lambda: hf.GemmaConfig(**_DECODER)),
    "gemma2": (CAUSAL, lambda: hf.Gemma2Config(**_DECODER, sliding_window=8)),
    "gpt2": (CAUSAL, _gpt2),
    "opt": (CAUSAL, _opt),
    "t5": (SEQ2SEQ, _t5),
}


_EQUAL_HEADS = {k: v for k, v in _DECODER.items() if k not in ("head_dim", "num_key_value_heads")}
_NO_WIDTH = {k: v for k, v in _DECODER.items() if k != "head_dim"}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "vocab_size": 101, "max_position_embeddings": 40,
}  # fmt: skip
_PROJECTED = {"projection_dim": 32}


def _falcon(**changes: Any) -> PreTrainedConfig:
    """One head of keys and values for all queries, unless told otherwise."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.FalconConfig(**(sizes | {"vocab_size": 101, "multi_query": True} | changes))


def _deepseek(**changes: Any) -> PreTrainedConfig:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8}
    sizes = _EQUAL_HEADS | {"num_key_value_heads": 4, "qk_nope_head_dim": 8}
    return hf.DeepseekV3Config(**(sizes | experts | groups | latent | changes))


#: Further ones, in the same form: mixtures of experts, one head of keys for all, attention in
#: windows, image halves of image and text models, latent attention, and no attention at all.
FURTHER: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "qwen3-moe": (
        CAUSAL,
        lambda: hf.Qwen3MoeConfig(
            **_DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
    ),
    "mixtral": (CAUSAL, lambda: hf.MixtralConfig(**_DECODER, **_EXPERTS)),
    "gpt-oss": (CAUSAL, lambda: hf.GptOssConfig(**_DECODER, **_EXPERTS, sliding_window=8)),
    "olmoe": (CAUSAL, lambda: hf.OlmoeConfig(**_NO_WIDTH, num_experts=4, num_experts_per_tok=2)),
    "granite-moe": (CAUSAL, lambda: hf.GraniteMoeConfig(**_NO_WIDTH, **_EXPERTS)),
    "falcon": (CAUSAL, _falcon),
    "falcon-alibi": (CAUSAL, lambda: _falcon(multi_query=False, alibi=True)),
    "longformer": (
        TEXT,
        lambda: hf.LongformerConfig(
            **(_TEXT | {"max_position_embeddings": 60}), attention_window=8, pad_token_id=1
        ),
    ),
    "clip": (
        IMAGE,
        lambda: hf.CLIPConfig(vision_config=_VISION | _PROJECTED, text_config=_TEXT | _PROJECTED),
    ),
    "siglip": (IMAGE, lambda: hf.SiglipConfig(vision_config=_VISION, text_config=_TEXT)),
    "deepseek-v3": (CAUSAL, _deepseek),
    "deepseek-v3-direct": (CAUSAL, lambda: _deepseek(q_lora_rank=None)),
    "mamba": (
        CAUSAL,
        lambda: hf.MambaConfig(
            hidden_size=32, num_hidden_layers=2, vocab_size=101, state_size=8, time_step_rank=4
        ),
    ),
    "mamba2": (
        CAUSAL,
        lambda: hf.Mamba2Config(
            hidden_size=32, num_hidden_layers=2, vocab_size=101, state_size=8, num_heads=4,
            head_dim=16, n_groups=1, chunk_size=8,
        ),
    ),
    "bart": (SEQ2SEQ, lambda: hf.BartConfig(**_PAIR)),
    "pegasus": (SEQ2SEQ, lambda: hf.PegasusConfig(**_PAIR)),
    "bloom": (CAUSAL, lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=101)),
    "mpt": (
        CAUSAL,
        lambda: hf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=101, max_seq_len=40),
    ),
    "gpt-neox": (CAUSAL, lambda: hf.GPTNeoXConfig(**_TEXT)),
    "gpt-j": (
        CAUSAL,
        lambda: hf.GPTJConfig(
            n_embd=32, n_layer=2, n_head=4, vocab_size=101, n_positions=40, rotary_dim=4
        ),
    ),
    "stablelm": (CAUSAL, lambda: hf.StableLmConfig(**_NO_WIDTH)),
    "phi3": (CAUSAL, lambda: hf.Phi3Config(**_NO_WIDTH)),
    "starcoder2": (CAUSAL, lambda: hf.Starcoder2Config(**_NO_WIDTH)),
    "cohere": (CAUSAL, lambda: hf.CohereConfig(**_NO_WIDTH)),
    "glm": (CAUSAL, lambda: hf.GlmConfig(**_DECODER)),
    "modernbert": (
        TEXT,
        lambda: hf.ModernBertConfig(
            **_TEXT, pad_token_id=0, global_attn_every_n_layers=2, local_attention=8
        ),
    ),
    "electra": (TEXT, lambda: hf.ElectraConfig(**_TEXT, embedding_size=32)),
}  # fmt: skip


def architecture_inputs(kind: str, *, image: int = 16, length: int = 16) -> tuple[InputSpec, ...]:
    """Batch of a task kind, one sample."""
    label = InputSpec("labels", (length,) if kind in (CAUSAL, SEQ2SEQ) else (), "int64")
    if kind == IMAGE:
        return (InputSpec("pixel_values", (3, image, image), "float32"), label)
    names = ("input_ids", "attention_mask")
    return (*(InputSpec(name, (length,), "int64") for name in names), label)


def architecture_spec(name: str, *, head: bool = True, **changes: Any) -> StepSpec:
    """Spec of a step of an architecture on its default targets."""
    kind, make = (ARCHITECTURES | FURTHER)[name]
    config = make()
    if kind in (IMAGE, TEXT):
        for key, value in CLASSES.items():
            setattr(config, key, value)
    base = base_model.build_empty(config, kind, attention="eager", precision="fp32")
    fields: dict[str, Any] = {
        "config": canonical(config.to_dict()),
        "kind": kind,
        "accelerator": "cpu",
        "targets": base_model.target_modules(base, "default"),
        "heads": base_model.head_modules(base) if head else (),
        "inputs": architecture_inputs(kind),
        "micro_batch": 3,
        "attention": "eager" if name in EAGER_ONLY else "sdpa",
    }
    return StepSpec(**(fields | changes))


def deep_spec(name: str, layers: int, **changes: Any) -> StepSpec:
    """As :func:`architecture_spec`, with so many layers."""
    kind, make = ARCHITECTURES[name]
    config = make()
    for key in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"):
        if key in config.to_dict():
            setattr(config, key, layers)
    kinds = config.to_dict().get("layer_types")
    if kinds:
        config.layer_types = [kinds[layer % len(kinds)] for layer in range(layers)]
    if kind in (IMAGE, TEXT):
        for key, value in CLASSES.items():
            setattr(config, key, value)
    base = base_model.build_empty(config, kind, attention="eager", precision="fp32")
    spec = architecture_spec(name, **changes)
    return replace(
        spec,
        config=canonical(config.to_dict()),
        targets=base_model.target_modules(base, "default"),
    )
