from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfit.estimator.calibration import Calibration
from rankfit.estimator.memory import Footprint
from rankfit.estimator.rank_solver import Limit, best_ranks, maximise
from rankfit.estimator.round_time import Payload
from rankfit.estimator.tracer import TraceCache

from .small import step_spec

worth = st.one_of(
    st.integers(0, 9).map(float),
    st.lists(st.integers(0, 9).map(float), min_size=4, max_size=4).map(
        lambda units: sorted(units, reverse=True)
    ),
)


def worth_of(worths, ranks) -> float:
    return sum(
        sum(each[:rank]) if isinstance(each, list) else each * rank
        for each, rank in zip(worths, ranks, strict=True)
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_brute_force(data):
    count = data.draw(st.integers(1, 4))
    worths = data.draw(st.lists(worth, min_size=count, max_size=count))
    caps = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    prices = st.lists(st.integers(1, 20).map(float), min_size=count, max_size=count)
    limits = data.draw(
        st.lists(
            st.builds(lambda p, b: Limit(np.array(p), float(b)), prices, st.integers(0, 150)),
            max_size=3,
        )
    )
    feasible = [
        ranks
        for ranks in product(*(range(1, cap + 1) for cap in caps))
        if all(limit.prices @ np.array(ranks) <= limit.budget for limit in limits)
    ]
    found = maximise(worths, 1, caps, limits)
    if not feasible:
        assert found is None
        return
    assert found is not None and tuple(found.tolist()) in feasible
    assert worth_of(worths, found.tolist()) == max(worth_of(worths, ranks) for ranks in feasible)


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return Footprint((TraceCache()(step_spec("vit", head=False)),))


def payload_of(footprint: Footprint) -> Payload:
    return Payload(dict.fromkeys(footprint.traces[0].modules, (32, 32)))


def test_memory_of_a_real_trace_equals_brute_force(footprint: Footprint):
    modules = footprint.traces[0].modules
    rng = np.random.default_rng(3)
    for budget_at in (1, 2, 3):
        budget = footprint.live(budget_at) + 300
        worths = {module: float(rng.uniform(1, 5)) for module in modules}
        best = max(
            sum(worths[m] * r for m, r in zip(modules, ranks, strict=True))
            for ranks in product(range(1, 6), repeat=len(modules))
            if footprint.live(dict(zip(modules, ranks, strict=True))) <= budget
        )
        found = best_ranks(footprint, payload_of(footprint), worths, budget_bytes=budget, cap=5)
        assert found is not None and found.worth == pytest.approx(best)
        assert footprint.live(found.ranks) <= budget


def test_upload_binds_and_nothing_fits(footprint: Footprint):
    payload = payload_of(footprint)
    modules = footprint.traces[0].modules
    worths = dict.fromkeys(modules, 1.0) | {modules[1]: 2.0}
    mbps = 7 * 64 * 4 * 8e-6  # seven units of rank in a second
    found = best_ranks(footprint, payload, worths, budget_bytes=10**9, cap=16, upload=(1.0, mbps))
    assert found is not None and sum(found.ranks.values()) == 7 and found.ranks[modules[1]] == 4
    assert best_ranks(footprint, payload, worths, budget_bytes=1000, cap=16) is None


def test_a_gpu_plan_survives_its_replay():
    terms = Calibration.cuda("9.0")
    spec = step_spec("vit", accelerator="cuda", head=False, micro_batch=64)
    footprint = Footprint((TraceCache()(spec),), terms)
    budget = footprint.expected(8, 0, 10**12)
    worths = dict.fromkeys(spec.targets, 1.0)
    found = best_ranks(footprint, payload_of(footprint), worths, budget_bytes=budget, cap=32)
    assert found is not None and footprint.holds(found.ranks, 0, budget)


@pytest.mark.parametrize(
    ("worths", "message"),
    [([-1.0], "finite numbers"), ([float("nan")], "finite"), ([[1.0, 2.0]], "grows")],
)
def test_bad_worths_are_named(worths, message):
    with pytest.raises(ValueError, match=message):
        maximise(worths, 1, [2], [])


def test_worths_of_other_modules_are_refused(footprint: Footprint):
    with pytest.raises(ValueError, match="other modules"):
        best_ranks(footprint, payload_of(footprint), {"x": 1.0}, budget_bytes=10**9, cap=4)
