from rankfit.estimator.calibration import GRAIN, Corrections, kind_of

from .small import MIB, device


def test_an_excess_is_kept_by_kind_and_the_largest_counts():
    corrections = Corrections()
    one, other = device(100, name="A"), device(100, name="B")
    for excess in (-MIB, 3 * GRAIN, 2 * GRAIN):
        corrections.learn(one, MIB, MIB + excess)
    assert corrections.extra_bytes(one) == 3 * GRAIN
    assert corrections.extra_bytes(other) == 0
    assert kind_of(device(5, "cuda", name="H100")) == "cuda H100 9.0"


def test_corrections_are_coarse_so_that_two_runs_of_one_seed_make_the_same_plans():
    corrections = Corrections()
    corrections.learn(device(1), MIB, MIB + GRAIN - 1)
    assert corrections.extra_bytes(device(1)) == 0
    corrections.learn(device(1), MIB, MIB + GRAIN + 1)
    assert corrections.extra_bytes(device(1)) == 2 * GRAIN


def test_what_was_learnt_survives_a_restart():
    corrections, again = Corrections(), Corrections()
    corrections.learn(device(1), MIB, 2 * MIB)
    again.restore(corrections.state())
    assert again.extra_bytes(device(1)) == MIB
