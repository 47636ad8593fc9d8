"""fp16, autocast and every optimizer: live bytes against a real CPU step, one trace for all."""

import numpy as np
import pytest

from rankfit.estimator.calibration import Calibration
from rankfit.estimator.depth import solve_deep
from rankfit.estimator.meta_libraries import LEAST_8BIT
from rankfit.estimator.trace import solve
from rankfit.estimator.tracer import TraceCache

from .architectures import architecture_spec, deep_spec
from .small import real_peak, recorded_peak, step_spec, uneven

TRACES = TraceCache()
STEPS = {
    "fp16": {"precision": "fp16"},
    "fp16-checkpointing-b": {"precision": "fp16", "checkpointing": True, "trainable": "b"},
    "autocast": {"autocast": "bf16"},
    "autocast-checkpointing": {"autocast": "bf16", "checkpointing": True},
    "autocast-fp16-a": {"autocast": "fp16", "trainable": "a"},
    "autocast-bf16-base": {"autocast": "bf16", "precision": "bf16", "clips": True},
}
OPTIMIZERS = {
    "fused": {"optimizer": "adamw-fused"},
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "adafactor": {"optimizer": "adafactor"},
    "whole head": {"whole_head": True},
    "fused, whole head": {"optimizer": "adamw-fused", "whole_head": True},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["vit", "swin", "bert", "deberta-v2", "llama", "gpt2", "t5"])
def test_live_bytes_equal_a_real_cpu_step(name: str, step: str):
    spec = architecture_spec(name, **STEPS[step])
    ranks = uneven(spec.targets)
    assert abs(TRACES(spec).peak_live(ranks) - real_peak(spec, ranks)) <= 256


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "t5"])
def test_a_gpu_trace_equals_a_retrace_at_uneven_ranks(name: str):
    spec = architecture_spec(name, accelerator="cuda", autocast="bf16", dropout=0.1)
    ranks, terms = uneven(spec.targets), Calibration.cuda("9.0")
    assert TRACES(spec).peak_live(ranks, calibration=terms) == recorded_peak(spec, ranks, terms)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_deep_models_under_autocast_are_read_off_shallow_ones(name: str):
    spec = deep_spec(name, 6, accelerator="cuda", autocast="bf16", checkpointing=True)
    deep, full = solve_deep(spec, (2, 3)), solve(spec, (2, 3))
    for field in ("events", "column", "amount", "sampled", "trained", "state"):
        assert np.array_equal(getattr(deep, field), getattr(full, field)), field


def test_autocast_keeps_copies_of_the_frozen_weights_for_the_backward_pass():
    """Activations halve, and a small batch still takes more than without autocast."""
    plain, cast = (
        TRACES(step_spec("deit-small", accelerator="cuda", autocast=each, micro_batch=2))
        for each in ("none", "bf16")
    )
    assert cast.peak_live(8) > plain.peak_live(8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_every_optimizer_takes_what_it_takes_on_a_cpu(name: str, optimizer: str):
    spec = step_spec(name, **OPTIMIZERS[optimizer])
    ranks = uneven(spec.targets)
    assert TRACES(spec).peak_live(ranks) == real_peak(spec, ranks)


@pytest.mark.parametrize("rank", [3, 40, 150])
def test_adamw_in_8_bits_takes_little_less_than_estimated(rank: int):
    """Below 4096 numbers its state is float32, which is no multiple of the rank; nor are scales."""
    spec = step_spec("vit", optimizer="adamw-8bit")
    states = 2 * 2 * len(spec.targets)  # two moments of A and B, 32 wide
    bound = states * (3 * LEAST_8BIT + 4 * rank)
    estimated = TRACES(spec).peak_live(rank)
    assert 0 <= estimated - real_peak(spec, dict.fromkeys(spec.targets, rank)) <= bound


def test_the_optimizers_differ_as_their_states_do():
    def state(optimizer: str, **changes: float) -> int:
        trace = TRACES(step_spec("deit-small", head=False, optimizer=optimizer, **changes))
        point = trace.point(100, 0, Calibration())
        return int(trace.optimizer @ point)

    adapters = 24 * 100 * (384 + 384)
    assert state("sgd") == 0
    assert state("sgd", momentum=0.9) == 4 * adapters
    assert state("adamw") == 8 * adapters + 48 * 4  # a step counter for each factor
    assert state("adafactor") == 4 * 24 * 2 * (384 + 100) + 48 * 4
    assert 2 * adapters < state("adamw-8bit") < 2.7 * adapters
