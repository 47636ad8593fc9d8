"""Bases in 4 and 8 bits, through bitsandbytes' backend for the CPU."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.adapters.adapter import Adapter, Factors, initial
from rankfit.adapters.product_merges import join
from rankfit.client.trainer import Job, evaluate, train
from rankfit.client.workspace import Workspace
from rankfit.configs.settings import from_flat
from rankfit.estimator.plan import Plan
from rankfit.tasks.base_model import (
    ModelError,
    fingerprint,
    load_base,
    quantization,
    target_modules,
    whole_modules,
)
from rankfit.tasks.lora import inject
from rankfit.tasks.targets import target_shapes

RECORDS = [{"instruction": f"Say {i}.", "output": f"it is {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    save_model(folder, save_tokenizer(folder, [str(r) for r in RECORDS]), hidden=64)
    (folder / "train.json").write_text(json.dumps(RECORDS))
    (folder / "test.json").write_text(json.dumps(RECORDS))
    return folder


def workspace(root: Path, kind: str) -> Workspace:
    flat = {
        "task.kind": "causal-lm",
        "task.evaluate": "loss",
        "model.source": str(root),
        "model.quantization": kind,
        "data.source": str(root),
        "train.learning-rate": 0.02,
        "train.steps": 4,
        "lora.rank": 4,
    }
    return Workspace(from_flat(flat), None)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_train_on_a_quantised_base(root: Path, kind: str) -> None:
    space, plain = workspace(root, kind), workspace(root, "none")
    targets = target_modules(space.base, "default")
    assert targets == target_modules(plain.base, "default")
    shapes = target_shapes(space.base, targets, 4)
    assert shapes == target_shapes(plain.base, targets, 4)
    frozen = space.base.get_submodule(targets[0]).weight
    assert frozen.dtype in (torch.uint8, torch.int8)
    with torch.no_grad():
        before = space.base(**space.task.train.collate(range(8))).logits
    assert fingerprint(space.base, heads=()) != fingerprint(plain.base, heads=())
    start = initial(shapes, 4, 1.0, {}, seed=0)
    plan = Plan(ranks=start.ranks, trainable="both", micro_batch=8, accumulation=1,
                checkpointing=False, peak_bytes=0, budget_bytes=0, binding="cap",
                remainder_rank=0, precision=kind)  # fmt: skip
    rows = np.arange(8)
    first = evaluate(space, start, rows)["loss"]
    update = train(space, Job("one", 1, plan, start, rows, None))
    assert all(tensor.dtype == torch.float32 for tensor in update.state.values())
    trained = Adapter.from_state_dict(update.state, 1.0)
    assert evaluate(space, trained, rows)["loss"] < first - 0.1
    # Not the stored bytes: on a CPU, bitsandbytes packs them anew for inference, and rounds.
    with torch.no_grad():
        after = space.base(**space.task.train.collate(range(8))).logits
    assert torch.allclose(after, before, atol=0.02)
    # What was learned on the quantised base holds on the 16-bit one, into which it is merged.
    assert evaluate(plain, trained, rows)["loss"] < evaluate(plain, start, rows)["loss"] - 0.1


def test_what_flora_folds_lies_beside_a_quantised_base(root: Path) -> None:
    """Nothing can be added to 4-bit weights: the folded part comes as a frozen second adapter."""
    space = workspace(root, "nf4")
    shapes = target_shapes(space.base, target_modules(space.base, "default"), 4)
    start, folded = (initial(shapes, 4, 1.0, {}, seed) for seed in (0, 1))
    moved = {m: Factors(torch.randn_like(own.b), own.a) for m, own in folded.factors.items()}
    sent = join(start, Adapter(moved, 1.0))
    plan = Plan(start.ranks, "both", 8, 1, False, 0, 0, "cap", remainder_rank=8, precision="nf4")
    rows = np.arange(8)
    update = train(space, Job("one", 1, plan, sent, rows, None))
    trained = Adapter.from_state_dict(update.state, 1.0)
    assert trained.ranks == start.ranks
    after = evaluate(space, join(trained, Adapter(moved, 1.0)), rows)["loss"]
    assert after < evaluate(space, sent, rows)["loss"] - 0.1


def test_what_cannot_be_quantised_is_refused_by_name(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = from_flat({"model.quantization": "nf4"})
    with pytest.raises(ModelError, match="'builtin:font-vit' is not a folder or hub id"):
        load_base(settings, 10)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'rankfit\[quantized\]'"):
        quantization(settings.model, "folder")
    assert quantization(from_flat({}).model, "builtin") == {}


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "int8"])
@pytest.mark.parametrize("modules", ["", "bert.pooler, classifier"])
def test_a_head_that_is_trained_is_not_quantised(tmp_path: Path, kind: str, modules: str) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    settings = from_flat(
        {
            "task.kind": "text-classification",
            "model.source": str(tmp_path),
            "model.quantization": kind,
            "head.modules": modules,
        }
    )
    base = load_base(settings, 3)
    heads = whole_modules(base, settings.head)
    for head in heads:
        weights = [p for p in base.get_submodule(head).parameters() if p.dim() == 2]
        assert weights and all(weight.is_floating_point() for weight in weights)
    targets = target_modules(base, "default")
    assert not base.get_submodule(targets[0]).weight.is_floating_point()
    model = inject(base, dict.fromkeys(targets, 2), scale=1.0, dropout=0.0, heads=heads)
    ids = torch.randint(3, 50, (4, 6))
    model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", ["nf4", "nf4-single", "int8"])
def test_a_plan_lowers_the_base_of_one_client(root: Path, precision: str) -> None:
    """The base is checked as the server has it; trained is on its weights in fewer bits."""
    space = workspace(root, "none")
    targets = target_modules(space.base, "default")
    expected, own = space.fingerprint, space.base
    start = initial(target_shapes(own, targets, 4), 4, 1.0, {}, seed=0)
    plan = Plan(start.ranks, "both", 8, 1, False, 0, 0, "cap", precision=precision)
    update = train(space, Job("one", 1, plan, start, np.arange(8), None))
    assert np.isfinite(update.metrics["train-loss"])
    assert space.base_at(precision).get_submodule(targets[0]).weight.dtype in (
        torch.uint8, torch.int8,
    )  # fmt: skip
    space.check_base(expected)
    assert space.base is own
