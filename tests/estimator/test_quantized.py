"""Bases in 4 and 8 bits: against bitsandbytes on a CPU, and by the layout of its tensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rankfit.adapters.names import Trainable
from rankfit.configs.settings import from_flat
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.depth import solve_deep
from rankfit.estimator.plan_search import Estimator
from rankfit.estimator.recording import LiveMemory
from rankfit.estimator.round_time import work_of
from rankfit.estimator.step import filled_batch, run_steps
from rankfit.estimator.step_spec import InputSpec, StepSpec
from rankfit.estimator.trace import solve
from rankfit.estimator.tracer import TraceCache
from rankfit.tasks import base_model
from rankfit.tasks.base_model import quantization
from rankfit.tasks.lora import inject, train_only

from .architectures import architecture_spec, deep_spec
from .small import device, recorded_peak, uneven

TRACES = TraceCache()
KINDS = ("nf4", "nf4-single", "int8")
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing-b": {"checkpointing": True, "trainable": "b"},
    "autocast": {"autocast": "bf16"},
    "fp16": {"precision": "fp16"},
}


def quantised(spec: StepSpec, folder: Path) -> nn.Module:
    """Save random weights of a spec's model and load them through bitsandbytes, with adapters."""
    config = AutoConfig.for_model(**json.loads(spec.config))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = from_flat(
        {"model.quantization": spec.quantization, "model.precision": spec.precision}
    ).model
    base = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=base_model.DTYPES[spec.precision],
        attn_implementation=spec.attention, **quantization(model, "folder"),
    )  # fmt: skip
    base.requires_grad_(False)
    adapted = inject(base, uneven(spec.targets), scale=1.0, dropout=0.0, heads=())
    trainable: Trainable = spec.trainable
    if trainable != "both":
        train_only(adapted, trainable)
    if spec.checkpointing:
        adapted.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return adapted.train()


def hidden(model: nn.Module) -> Iterator[Tensor]:
    """Tensors of quantised weights that are neither parameters nor buffers."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.state2.absmax, state.state2.code, state.offset)
        if getattr(weight, "SCB", None) is not None:
            yield weight.SCB


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_live_bytes_equal_a_step_of_bitsandbytes(name: str, kind: str, step: str, tmp_path: Path):
    changes = {"precision": "bf16"} | STEPS[step]
    spec = architecture_spec(name, quantization=kind, **changes)
    model = quantised(spec, tmp_path)
    with LiveMemory().baseline(model).count(hidden(model)) as live:
        run_steps(spec, model, lambda: filled_batch(spec))
    assert abs(TRACES(spec).peak_live(uneven(spec.targets)) - live.peak) <= 256


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.127), ("nf4-single", 4.5), ("int8", 8.0)])
def test_weights_take_the_bits_of_their_layout(kind: str, bits: float):
    def loaded(quantization: str) -> int:
        config = AutoConfig.for_model("llama", hidden_size=1024, num_hidden_layers=2,
                                      intermediate_size=4096, num_attention_heads=8,
                                      vocab_size=100)  # fmt: skip
        spec = architecture_spec("llama", precision="bf16", quantization=quantization)
        spec = StepSpec(**(vars(spec) | {"config": json.dumps(config.to_dict(), default=str)}))
        trace = TRACES(spec)
        return int(trace.row(trace.loaded - 1)[0])

    weights = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert loaded("none") - loaded(kind) == pytest.approx(weights * (16 - bits) / 8, rel=0.006)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_trace_equals_a_retrace_at_uneven_ranks(kind: str):
    spec = architecture_spec(
        "llama", accelerator="cuda", precision="bf16", quantization=kind, dropout=0.1
    )
    ranks, terms = uneven(spec.targets), Calibration.cuda("9.0")
    assert TRACES(spec).peak_live(ranks, calibration=terms) == recorded_peak(spec, ranks, terms)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_deep_models_are_read_off_shallow_ones(kind: str):
    spec = deep_spec("llama", 6, accelerator="cuda", precision="bf16", quantization=kind)
    deep, full = solve_deep(spec, (2, 3)), solve(spec, (2, 3))
    for field in ("events", "column", "amount", "sampled", "trained", "state"):
        assert np.array_equal(getattr(deep, field), getattr(full, field)), field


def test_a_model_of_3_billion_weights_fits_a_smaller_gpu_in_4_bits():
    """As traced by hand before: nf4 with checkpointing spares four of nine gigabytes."""
    config = AutoConfig.for_model(
        "llama", hidden_size=3072, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    words = [InputSpec(each, (512,), "int64") for each in ("input_ids", "attention_mask", "labels")]
    settings = from_flat(
        {"model.precision": "bf16", "plan.precisions": "nf4", "train.batch-size": 4,
         "train.gradient-checkpointing": True, "plan.search": ""}
    )  # fmt: skip
    estimator = Estimator.for_run(settings, config, words, kind="causal-lm", traces=TRACES)
    own, lowered = (step for step in estimator.steps)
    live = {
        step.precision: estimator.footprint(device(1, "cuda"), step).live(16) / 2**20
        for step in (own, lowered)
    }
    assert live["bf16"] == pytest.approx(9611, rel=0.02)
    assert live["nf4"] == pytest.approx(5557, rel=0.02)
    assert estimator.fit(device(7000, "cuda")).plan.precision == "nf4"  # type: ignore[union-attr]
    assert estimator.fit(device(12000, "cuda")).plan.precision == "bf16"  # type: ignore[union-attr]


def test_flops_do_not_depend_on_how_weights_are_stored():
    plain = architecture_spec("llama", precision="bf16")
    assert work_of(plain) == work_of(architecture_spec("llama", quantization="nf4"))
    assert torch.get_default_dtype() == torch.float32
