from dataclasses import replace

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


def test_no_one_client_moves_another_s_plan():
    """One that lies about its peak costs itself; what two of a kind measure counts for all."""
    corrections = Corrections()
    kind = [replace(device(100), client=name) for name in "abcd"]
    corrections.learn(kind[0], MIB, 10**15)
    assert corrections.extra_bytes(kind[0]) == 100 * MIB, "never more than there is"
    assert [corrections.extra_bytes(own) for own in kind[1:]] == [0, 0, 0]
    corrections.learn(kind[1], MIB, 2 * MIB)
    assert corrections.extra_bytes(kind[1]) == MIB
    assert corrections.extra_bytes(kind[2]) == corrections.extra_bytes(kind[3]) == MIB
    corrections.learn(kind[2], MIB, MIB)
    assert corrections.extra_bytes(kind[3]) == MIB, "the median of 0, 1 and 99 MiB"


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
