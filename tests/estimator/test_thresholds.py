"""Least memory of each rank on a GPU: exact where it is monotone, found in few replays."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankfit.estimator.calibration import Calibration
from rankfit.estimator.memory import GRAIN, Footprint, Thresholds
from rankfit.estimator.trace import Trace


class Fleet:
    """Ranks that need so many grains, whatever else; counts the replays."""

    def __init__(self, needs: list[int]) -> None:
        self.needs = needs
        self.replays = 0

    def attempt(self, rank: int, cap: int) -> tuple[bool, int]:
        assert cap % GRAIN == 0
        self.replays += 1
        need = self.needs[rank - 1] * GRAIN
        # Both answers hold for one grain only: no search has less to go by.
        return (True, cap) if cap >= need else (False, cap + GRAIN)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(0, 12))
def test_the_least_cap_of_every_rank_is_found_in_whatever_parts_it_is_asked(needs, part):
    fleet = Fleet(needs)
    live = np.array([max(1, need * GRAIN // 2 - 77) for need in needs])
    thresholds = Thresholds(fleet.attempt)
    thresholds.up_to(live[:part])
    assert thresholds.up_to(live).tolist() == [need * GRAIN for need in needs]


def test_ranks_of_one_need_take_two_replays_each():
    fleet = Fleet([300] * 50)
    Thresholds(fleet.attempt).up_to(np.full(50, GRAIN))
    assert fleet.replays < 2 * 50 + 20


def test_a_real_step_survives_its_least_cap_and_not_a_segment_less(deit_sdpa: Trace):
    terms = Calibration.cuda("9.0")
    footprint = Footprint((deit_sdpa,), terms)
    for rank in (1, 17, 40):
        cap = footprint.needed(rank) - terms.context
        assert footprint.replays(rank, cap_bytes=cap)[0].survived
        assert not footprint.replays(rank, cap_bytes=cap - GRAIN)[0].survived
        assert footprint.expected(rank, 0, cap + terms.context) <= cap + terms.context


def test_a_footprint_on_a_cpu_needs_its_live_bytes(deit_sdpa: Trace):
    from dataclasses import replace

    spec = replace(deit_sdpa.spec, accelerator="cpu")
    footprint = Footprint((replace(deit_sdpa, spec=spec),))
    assert footprint.needed(9) == footprint.live(9)
