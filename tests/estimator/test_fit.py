import subprocess
import sys
from dataclasses import replace

import pytest

from rankfit.configs.settings import from_flat
from rankfit.estimator.calibration import Calibration, workspace_bytes
from rankfit.estimator.plan import Plan
from rankfit.estimator.plan_search import (
    Estimate,
    Estimator,
    NothingFits,
    Step,
    halvings,
    inputs_of,
    steps,
)
from rankfit.estimator.tracer import TraceCache

from .small import MIB, deit_small_config, device, images, real_peak, vit_config

RUN = {"lora.rank": 16, "train.batch-size": 8, "plan.search": "micro-batch,checkpointing"}


@pytest.fixture(scope="module")
def cache() -> TraceCache:
    return TraceCache()


@pytest.fixture
def make(cache: TraceCache):
    def make(phases=("both",), **changes) -> Estimator:
        flat = RUN | {key.replace("__", "."): value for key, value in changes.items()}
        flat = {key.replace("_", "-"): value for key, value in flat.items()}
        return Estimator.for_run(
            from_flat(flat), vit_config(), images(16), phases=phases, traces=cache
        )

    return make


def at(estimator: Estimator, rank: int, step: Step) -> int:
    """Bytes that a CPU device needs for a rank at a step."""
    return estimator.footprint(device(1), step).live(rank)


def fitted(estimator: Estimator, nbytes: int, **changes) -> Estimate:
    result = estimator.fit(device(nbytes / MIB, **changes))
    assert isinstance(result, Estimate), result
    return result


FULL, HALF = Step(8, 1, False), Step(4, 2, False)


# Bounds.


def test_plenty_of_memory_binds_at_the_cap(make):
    estimate = fitted(make(), 100 * MIB)
    assert estimate.plan.rank == 16 and estimate.plan.binding == "cap"
    assert set(estimate.plan.ranks) == set(make().spec.targets)
    assert (estimate.plan.micro_batch, estimate.plan.accumulation) == (8, 1)


def test_a_group_shares_the_batch_and_sets_nccl_aside(make):
    estimator = make()
    alone = at(estimator, 16, FULL)
    of_two = estimator.fit(replace(device(at(estimator, 16, HALF) / MIB), group_size=2))
    assert isinstance(of_two, Estimate) and of_two.plan.rank == 16
    assert (of_two.plan.micro_batch, of_two.plan.accumulation) == (4, 1)
    assert of_two.plan.peak_bytes < alone
    of_three = estimator.fit(replace(device(100), group_size=3))
    assert isinstance(of_three, Estimate) and of_three.plan.micro_batch == 3
    gpu = device(4096, "cuda")
    assert (
        Calibration.of(replace(gpu, group_size=2)).outside
        == Calibration.of(gpu).outside + 688 * MIB
    )


@pytest.mark.parametrize("rank", [1, 5, 15])
def test_memory_binds_at_the_exact_byte(make, rank):
    estimator = make()
    need = at(estimator, rank, FULL)
    plan = fitted(estimator, need).plan
    assert plan.rank == rank and plan.binding == "memory"
    assert plan.peak_bytes == need == plan.budget_bytes
    if rank > 1:
        assert fitted(estimator, need - 1).plan.rank == rank - 1


def test_the_plan_is_what_a_real_step_takes(make):
    estimator = make()
    plan = fitted(estimator, at(estimator, 7, FULL)).plan
    spec = replace(estimator.spec, micro_batch=plan.micro_batch)
    assert real_peak(spec, plan.ranks, cap_bytes=plan.budget_bytes) == plan.peak_bytes


@pytest.mark.parametrize("link", ["upload", "download"])
def test_the_link_binds(make, link):
    estimator = make(**{f"plan__{link}_seconds": 1.0, "head__mode": "frozen"})
    per_rank = estimator.payload.bytes_per_rank()
    estimate = fitted(estimator, 100 * MIB, **{f"{link}_mbps": 5.5 * per_rank * 8e-6})
    assert estimate.plan.rank == 5 and estimate.plan.binding == link
    assert getattr(estimate.bounds, link) == 5


def test_paper_ranks_on_a_cpu_fleet():
    settings = from_flat(
        {
            "lora.rank": 48,
            "lora.dropout": 0.1,
            "head.mode": "frozen",
            "plan.upload-seconds": 1.0,
            "plan.download-seconds": 1.0,
            "plan.search": "",
        }
    )
    estimator = Estimator.for_run(settings, deit_small_config(100), images(224))
    links = ((7.08, 51.1), (10.62, 63.4), (14.16, 86.3))
    plans = [
        fitted(estimator, 8192 * MIB, upload_mbps=up, download_mbps=down).plan for up, down in links
    ]
    assert [sum(plan.ranks.values()) for plan in plans] == [288, 432, 576]
    assert {plan.binding for plan in plans} == {"upload"}


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_more_memory_never_means_a_lower_rank(make, accelerator):
    estimator = make(plan__search="")
    context = Calibration.cuda("9.0").context + 64 * MIB if accelerator == "cuda" else 0
    ranks = []
    for kib in range(250, 700, 15):
        report = device((kib * 1024 + context) / MIB + 1 * bool(context), accelerator)
        result = estimator.fit(report)
        ranks.append(result.plan.rank if isinstance(result, Estimate) else 0)
    assert ranks == sorted(ranks)


def test_what_a_client_took_above_its_estimate_is_kept_free(make):
    estimator = make()
    need = at(estimator, 9, FULL)
    result = estimator.fit(device(need / MIB), extra_bytes=need - at(estimator, 4, FULL))
    assert isinstance(result, Estimate) and result.plan.rank == 4
    margin = make(plan__margin_mib=(need - at(estimator, 4, FULL)) / MIB)
    assert fitted(margin, need).plan.rank == 4


# The search.


def test_order_of_the_search():
    settings = from_flat(RUN)
    assert [str(step) for step in steps(settings, can_checkpoint=True)] == [
        *(f"micro-batch {size}, fp32 base" for size in (8, 4, 2, 1)),
        *(f"micro-batch {size} with checkpointing, fp32 base" for size in (8, 4, 2, 1)),
    ]
    assert len(steps(settings, can_checkpoint=False)) == 4
    only = from_flat(RUN | {"plan.search": ""})
    assert steps(only, can_checkpoint=True) == [FULL]
    always = from_flat(RUN | {"train.gradient-checkpointing": True})
    assert all(step.checkpointing for step in steps(always, can_checkpoint=True))
    assert all(s.micro_batch * s.accumulation == 8 for s in steps(settings, can_checkpoint=True))


def test_halvings_divide_the_batch():
    assert halvings(32) == [32, 16, 8, 4, 2, 1]
    assert halvings(30) == [30, 15, 6, 3, 1]
    assert halvings(7) == [7, 1] and halvings(1) == [1]


def test_a_smaller_micro_batch_comes_before_a_lower_rank_than_the_least(make):
    estimator = make(plan__min_rank=8)
    below = at(estimator, 8, FULL) - 1
    plan = fitted(estimator, below).plan
    assert (plan.micro_batch, plan.accumulation, plan.checkpointing) == (4, 2, False)
    assert plan.rank >= 8
    lenient = fitted(make(plan__min_rank=7), below).plan
    assert lenient.micro_batch == 8 and lenient.rank == 7


def test_checkpointing_comes_last(make):
    estimator = make(plan__min_rank=2)
    below = at(estimator, 2, Step(1, 8, False)) - 1
    assert fitted(estimator, below).plan.checkpointing
    without = make(plan__min_rank=2, plan__search="micro-batch").fit(device(below / MIB))
    assert isinstance(without, NothingFits)


def test_a_gpu_pays_its_context_and_what_the_allocator_reserves(make):
    estimator = make(plan__search="")
    report = device(2048, "cuda")
    result = estimator.fit(report)
    assert isinstance(result, Estimate)
    footprint = estimator.footprint(report, FULL)
    replayed = footprint.replays(result.plan.rank)[0]
    assert result.plan.peak_bytes == 470 * MIB + replayed.reserved
    assert replayed.reserved > footprint.live(result.plan.rank)


# Nothing fits.


def test_nothing_fits_says_what_is_needed(make):
    estimator = make()
    result = estimator.fit(device(0.1))
    assert isinstance(result, NothingFits) and result.binding == "memory"
    assert result.needs_bytes > result.budget_bytes == int(0.1 * MIB)
    assert "needs" in result.reason and "has 0.1 MiB" in result.reason
    enough = estimator.fit(device((result.needs_bytes + 1) / MIB))
    assert isinstance(enough, Estimate)


def test_nothing_fits_through_a_slow_link(make):
    estimator = make(plan__upload_seconds=1.0)
    result = estimator.fit(device(100, upload_mbps=1e-4))
    assert isinstance(result, NothingFits) and result.binding == "upload"
    assert "plan.upload-seconds allows 1" in result.reason


# Methods: phases, remainders, ranks per module.


def test_alternating_phases_hold_each_and_keep_both_optimizer_states(make):
    alternating = make(phases=("b", "a"))
    single = [make(phases=(trainable,)) for trainable in ("a", "b")]
    whole = at(alternating, 8, FULL)
    state = sum(
        int(f.optimizer[1:5].sum()) * 8 for e in single for f in e.footprint(device(1), FULL).traces
    )
    largest = max(at(each, 8, FULL) for each in single)
    assert largest < whole <= largest + state
    assert fitted(alternating, 100 * MIB).plan.trainable == "b"


def test_a_tail_goes_to_those_who_cannot_train_the_whole(make):
    estimator = make(method__remainder=True, plan__search="")
    assert fitted(estimator, 100 * MIB).plan.remainder_rank == 0, "the whole rank: nothing is left"
    budget = at(make(plan__search=""), 9, FULL)
    plan = fitted(estimator, budget).plan
    assert plan.remainder_rank == 16 and 1 <= plan.rank < 9
    assert plan.peak_bytes <= budget


def test_a_tail_needs_the_download(make):
    estimator = make(method__remainder=True, plan__search="", plan__download_seconds=1.0)
    budget = at(make(plan__search=""), 9, FULL)
    payload = estimator.payload
    mbps = (payload.head_bytes + 12.5 * payload.bytes_per_rank()) * 8e-6
    assert fitted(estimator, budget, download_mbps=mbps).plan.remainder_rank == 0


def test_a_method_may_lower_ranks_module_by_module(make):
    estimator = make()
    report = device(100)
    plan = fitted(estimator, 100 * MIB).plan
    lowered = estimator.lower(report, plan, 4)
    assert lowered.rank == 4 and lowered.binding == "method"
    assert lowered.peak_bytes == at(estimator, 4, FULL)
    first, *others = estimator.spec.targets
    mixed = estimator.lower(report, plan, {first: 0} | dict.fromkeys(others, 4))
    assert set(mixed.ranks) == set(others)
    assert mixed.peak_bytes < lowered.peak_bytes
    spec = replace(estimator.spec, targets=tuple(others))
    assert mixed.peak_bytes == real_peak(spec, mixed.ranks)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(-1, "is -1"), (0, "no rank is above 0"), ({"elsewhere": 2}, "'elsewhere'")],
)
def test_ranks_that_cannot_be_are_refused(make, ranks, message):
    estimator = make()
    with pytest.raises(ValueError, match=message):
        estimator.lower(device(100), fitted(estimator, 100 * MIB).plan, ranks)


def test_plans_travel_unchanged(make):
    plan = fitted(make(), 100 * MIB).plan
    assert Plan.from_dict(plan.to_dict()) == plan


# Settings and terms.


def test_least_rank_above_the_cap_is_refused(make):
    with pytest.raises(ValueError, match=r"plan\.min-rank 17 is above lora\.rank 16"):
        make(plan__min_rank=17)


def test_negative_memory_is_refused(make):
    with pytest.raises(ValueError, match="extra_bytes is -1"):
        make().fit(device(100), extra_bytes=-1)
    with pytest.raises(ValueError, match="context is -1"):
        Calibration(context=-1)


def test_terms_follow_the_device(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert Calibration.of(device(100)) == Calibration()
    assert Calibration.cuda("9.0").cublas_workspace == 32 * MIB
    assert Calibration.cuda("8.6").cublas_workspace == 8_519_680
    assert workspace_bytes(":4096:2:16:8") == 8_519_680
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert Calibration.cuda("9.0").cublas_workspace == 128 * 1024
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG is 'big'"):
        workspace_bytes("big")


def test_inputs_of_a_batch():
    import torch

    batch = {"pixel_values": torch.zeros(2, 3, 16, 16), "labels": torch.zeros(2).long()}
    assert inputs_of(batch) == images(16)


def test_reports_and_plans_need_no_torch():
    code = (
        "import sys, rankfit.estimator.device_report, rankfit.estimator.plan; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=".")
