from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfit.estimator.calibration import Calibration
from rankfit.estimator.recording import record
from rankfit.estimator.step_spec import StepSpec
from rankfit.estimator.trace import Trace, TraceError, solve
from rankfit.estimator.tracer import TraceCache, trace
from rankfit.tasks.base_model import ModelError

from .small import MIB, real_peak, recorded_peak, step_spec

TRACES = TraceCache()
H100 = Calibration.cuda("9.0")


# Ranks that fit.


def test_ranks_that_live_bytes_allow_in_2048_mib(deit_eager: Trace, deit_sdpa: Trace):
    def largest(trace: Trace) -> int:
        fits = (trace.peak_live(r, calibration=H100) <= 2048 * MIB for r in range(1, 385))
        return sum(fits)

    assert largest(deit_eager) == 260
    assert largest(deit_sdpa) == 384


# The closed form.

VARIANTS = [
    {},
    {"attention": "eager", "dropout": 0.1},
    {"checkpointing": True},
    {"accelerator": "cuda", "dropout": 0.1},
    {"accelerator": "cuda", "checkpointing": True, "trainable": "b"},
    {"accumulates": True, "trainable": "a"},
]


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("architecture", ["vit", "bert"])
def test_closed_form_equals_a_recording_at_any_ranks(architecture, changes, data):
    spec = step_spec(architecture, **changes)
    values = data.draw(
        st.lists(st.integers(1, 40), min_size=len(spec.targets), max_size=len(spec.targets))
    )
    ranks = dict(zip(spec.targets, values, strict=True))
    terms = H100 if spec.accelerator == "cuda" else Calibration()
    assert TRACES(spec).peak_live(ranks, calibration=terms) == recorded_peak(
        spec, ranks, calibration=terms
    )


@pytest.mark.parametrize("micro_batch", [1, 5])
@pytest.mark.parametrize("changes", [{}, {"accelerator": "cuda", "attention": "eager"}])
@pytest.mark.parametrize("architecture", ["vit", "bert"])
def test_micro_batches_share_two_recordings(architecture, changes, micro_batch):
    spec = step_spec(architecture, micro_batch=micro_batch, **changes)
    shared, own = TRACES(spec), trace(spec)
    np.testing.assert_array_equal(shared.events, own.events)
    np.testing.assert_array_equal(shared.column, own.column)
    np.testing.assert_array_equal(shared.amount, own.amount)


def test_the_peak_is_convex_and_grows_with_every_rank():
    traced = TRACES(step_spec("vit"))
    peaks = [traced.peak_live(rank) for rank in range(1, 60)]
    slopes = np.diff(peaks)
    assert (slopes > 0).all() and (np.diff(slopes) >= 0).all()


def test_price_is_the_peak_of_one_more_unit_of_rank():
    traced = TRACES(step_spec("vit"))
    module = traced.modules[0]
    ranks = dict.fromkeys(traced.modules, 8)
    more = ranks | {module: 9}
    price = traced.price(module, ranks)
    assert price == traced.peak_live(more) - traced.peak_live(ranks)
    with pytest.raises(ValueError, match="'lm_head' is not adapted"):
        traced.price("lm_head")


# Against real CPU training.

REAL = [  # what test_architectures does not vary
    {"attention": "eager"},
    {"attention": "eager", "checkpointing": True, "dropout": 0.1, "accumulates": True},
    {"padded": False, "optimizer": "sgd", "head": False},
    {"clips": True, "micro_batch": 1},
]


@pytest.mark.parametrize("changes", REAL)
@pytest.mark.parametrize("architecture", ["vit", "bert"])
def test_live_bytes_equal_a_real_cpu_step(architecture, changes):
    spec = step_spec(architecture, **changes)
    ranks = {module: 3 * index + 1 for index, module in enumerate(spec.targets)}
    assert abs(TRACES(spec).peak_live(ranks) - real_peak(spec, ranks)) <= 256


def test_live_bytes_with_a_tail_equal_a_real_cpu_step():
    spec = step_spec("vit", remainder=True)
    ranks = {module: index + 1 for index, module in enumerate(spec.targets)}
    remainder = {module: 8 - rank for module, rank in ranks.items()}
    assert (
        abs(
            TRACES(spec).peak_live(ranks, remainder_ranks=remainder)
            - real_peak(spec, ranks, remainder)
        )
        <= 256
    )


def test_a_cap_at_the_estimate_lets_the_real_step_through_and_one_below_does_not():
    import torch

    spec = step_spec("vit")
    ranks = dict.fromkeys(spec.targets, 4)
    peak = TRACES(spec).peak_live(ranks)
    assert real_peak(spec, ranks, cap_bytes=peak) == peak
    with pytest.raises(torch.OutOfMemoryError):
        real_peak(spec, ranks, cap_bytes=peak - 1)


# Errors and keys.


def test_key_is_stable_and_tells_specs_apart():
    spec = step_spec("vit")
    assert spec.key == step_spec("vit").key
    assert spec.key != replace(spec, micro_batch=8).key
    assert hash(spec) == hash(step_spec("vit"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("precision", "fp8"),
        ("attention", "flash"),
        ("trainable", "c"),
        ("optimizer", "lion"),
        ("accelerator", "tpu"),
        ("kind", "regression"),
        ("micro_batch", 0),
        ("dropout", 1.0),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        replace(step_spec("vit"), **{field: value})


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"lora\.targets"):
        replace(step_spec("vit"), targets=())
    with pytest.raises(ModelError, match="no_such_layer"):
        trace(replace(step_spec("vit"), targets=("no_such_layer",)))


@pytest.mark.parametrize("ranks", [0, -1])
def test_ranks_below_one_are_refused(ranks):
    with pytest.raises(ValueError, match=f"is {ranks}; expected at least 1"):
        TRACES(step_spec("vit")).peak_live(ranks)


def test_ranks_of_other_modules_are_refused():
    with pytest.raises(ValueError, match="other modules"):
        TRACES(step_spec("vit")).peak_live({"elsewhere": 3})


def test_a_step_without_closed_form_says_so(monkeypatch):
    from rankfit.estimator import trace as tracer

    def quadratic(spec: StepSpec, ranks, remainder_ranks=None):
        recording = record(spec, ranks, remainder_ranks)
        first = recording.allocations[-1]
        recording.allocations[-1] = replace(first, nbytes=next(iter(ranks.values())) ** 2)
        return recording

    monkeypatch.setattr(tracer, "record", quadratic)
    with pytest.raises(TraceError, match="not proportional to one adapter's rank"):
        solve(step_spec("vit"), (4, 4))
