"""FLOPs of a step, and what they say of a deadline."""

from dataclasses import replace

import pytest

from rankfit.configs.settings import from_flat
from rankfit.estimator.plan_search import Estimate, Estimator, NothingFits
from rankfit.estimator.round_time import Throughput, Work, _count, even_rank, work_of

from .architectures import deep_spec
from .small import device, images, step_spec, vit_config


def test_flops_of_deit_small_are_those_of_its_matrices():
    """Forward, and backward for the inputs alone: the base is frozen; 24 adapters are trained."""
    tokens, width, layers = 197, 384, 12
    linear = 2 * tokens * (4 * width**2 + 2 * width * 4 * width) * layers
    attention = 4 * tokens**2 * width * layers
    work = work_of(step_spec("deit-small"))
    assert work.base == pytest.approx(2 * linear + 3.5 * attention, rel=0.03)
    adapters = 24 * 2 * tokens * 2 * width
    assert work.per_rank == pytest.approx(3 * adapters, rel=0.03)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_flops_of_a_deep_model_follow_from_shallow_ones(name: str):
    spec = deep_spec(name, 6)
    whole = _count(replace(spec, accelerator="cuda", micro_batch=2), 7)
    assert work_of(spec).flops(7) == pytest.approx(whole, rel=1e-9)


def test_checkpointing_runs_the_forward_pass_again():
    plain, again = (work_of(step_spec("vit", checkpointing=each)) for each in (False, True))
    assert 1.2 * plain.base < again.base < 1.6 * plain.base


def test_a_bound_is_the_last_rank_in_time():
    work, throughput = (
        Work(base=100.0, per_rank=10.0),
        Throughput(flops_per_second=1000.0, examples=10),
    )
    assert throughput.seconds(work.flops(5)) == 1.5
    assert throughput.bound(work, 1.5) == 5 and throughput.bound(work, 1.49) == 4
    assert throughput.bound(work, 0.5) == 0 and throughput.bound(work, 0) is None
    with pytest.raises(ValueError, match="figures above 0"):
        Throughput(0.0, 10)


def test_ranks_that_differ_count_by_the_size_of_their_modules():
    shapes = {"a": (10, 10), "b": (30, 30)}
    assert even_rank({"a": 4, "b": 4}, shapes) == 4
    assert even_rank({"b": 4}, shapes) == 3


def test_a_deadline_binds_like_memory():
    flat = {"lora.rank": 16, "train.batch-size": 8, "plan.deadline-seconds": 10.0}
    estimator = Estimator.for_run(from_flat(flat), vit_config(), images(16))  # type: ignore[arg-type]
    work = estimator.work(estimator.steps[0])
    unknown = estimator.fit(device(100))
    assert isinstance(unknown, Estimate) and unknown.plan.rank == 16, "no throughput, no bound"
    throughput = Throughput(100 * work.flops(6.5) / 10.0, 100)
    fit = estimator.fit(device(100), throughput=throughput)
    assert isinstance(fit, Estimate)
    assert (fit.plan.rank, fit.plan.binding, fit.bounds.time) == (6, "time", 6)
    slow = Throughput(100 * work.flops(0.5) / 10.0, 100)
    refused = estimator.fit(device(100), throughput=slow)
    assert isinstance(refused, NothingFits) and refused.binding == "time"
    assert "plan.deadline-seconds allows 10" in refused.reason
