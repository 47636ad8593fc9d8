"""One answer for a device, alone or in a fleet, and as slow exact search gives it."""

import random

import pytest

from rankfit.configs.settings import from_flat
from rankfit.estimator.allocator import replay
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.memory import Footprint
from rankfit.estimator.plan_search import Estimate, Estimator
from rankfit.estimator.trace import Trace
from rankfit.estimator.tracer import TraceCache

from .small import MIB, device, images, vit_config

RANK = 24
TRACES = TraceCache()


def estimator(**changes: object) -> Estimator:
    flat = {"lora.rank": RANK, "train.batch-size": 8, "plan.search": "micro-batch", **changes}
    config = vit_config(hidden_size=128, intermediate_size=512, image_size=64)
    return Estimator.for_run(from_flat(flat), config, images(64), traces=TRACES)  # type: ignore[arg-type]


def budgets(own: Estimator, count: int) -> list[int]:
    """Bytes from below the least step's need to above the most, in no order."""
    needs = list(own.needs(device(1, "cuda")).values())
    whole = own.footprint(device(1, "cuda"), own.steps[0]).expected(RANK, 0, 2**62)
    draw = random.Random(0)
    return [draw.randrange(min(needs) - 4 * MIB, whole + 8 * MIB) for _ in range(count)]


def test_a_fleet_gets_what_each_device_gets_alone():
    own = estimator()
    for size in budgets(own, 25):
        report = device(size / MIB, "cuda")
        fresh = Estimator(own.spec, own.payload, own.settings, traces=TRACES)
        assert own.fit(report) == fresh.fit(report)


def test_the_largest_rank_is_that_of_a_scan_without_any_memory(deit_sdpa: Trace):
    """Every rank from the cap down, replayed in Python under the device's own cap."""
    footprint, limit = Footprint((deit_sdpa,), Calibration.cuda("9.0")), 90
    terms = footprint.calibration
    caps = [footprint.live(limit) + step * 16 * MIB for step in range(20)]
    answers = {footprint.largest(limit, cap + terms.context): cap for cap in caps}
    assert len(set(answers) - {0, limit}) >= 2
    for answer, cap in list(answers.items())[-3:]:
        for rank in range(limit, answer - 1, -1):
            sizes = deit_sdpa.sizes(deit_sdpa.point(rank, 0, terms))
            survived = replay(sizes.tolist(), deit_sdpa.events.tolist(), cap).survived
            assert survived == (rank == answer)


def test_distinct_outcomes_are_replayed_once(monkeypatch: pytest.MonkeyPatch):
    from rankfit.estimator import memory

    calls: list[int | None] = []
    fast = memory.replay_fast
    monkeypatch.setattr(
        memory, "replay_fast", lambda *args: (calls.append(args[-1]), fast(*args))[1]
    )
    own = estimator(**{"plan.search": ""})
    sizes = budgets(own, 400)
    for size in sizes:
        own.fit(device(size / MIB, "cuda"))
    first = len(calls)
    for size in sizes:
        own.fit(device(size / MIB, "cuda"))
    assert len(calls) == first < len(sizes)


def test_uniform_ranks_share_replays_however_they_are_written():
    own = estimator()
    footprint = own.footprint(device(1, "cuda"), own.steps[0])
    named = dict.fromkeys(own.spec.targets, 5)
    assert footprint.replays(5)[0] is footprint.replays(named)[0]
    uneven = named | {own.spec.targets[0]: 6}
    assert footprint.replays(uneven)[0] is not footprint.replays(5)[0]
    with pytest.raises(ValueError, match="other modules"):
        footprint.replays({"elsewhere": 5})


def test_a_plan_says_which_steps_were_too_large():
    own = estimator()
    least = own.needs(device(1, "cuda"))
    first, second = own.steps[:2]
    between = (least[first] + least[second]) // 2
    fit = own.fit(device(between / MIB, "cuda"))
    assert isinstance(fit, Estimate)
    assert fit.rejected == tuple(own.steps[: own.steps.index(first) + 1])
    assert fit.plan.micro_batch == second.micro_batch


def test_a_breakdown_of_a_gpu_is_in_blocks_and_of_a_cpu_in_live_bytes():
    own = estimator()
    cpu = own.footprint(device(1), own.steps[0])
    gpu = own.footprint(device(1, "cuda"), own.steps[0])
    assert cpu.breakdown(5).total == cpu.live(5)
    assert gpu.breakdown(5).total == gpu.replays(5)[0].allocated > gpu.live(5)
