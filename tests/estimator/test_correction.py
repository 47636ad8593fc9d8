from rankfit.estimator.correction import Corrections, kind_of

from .small import device


def test_an_excess_is_kept_by_kind_and_the_largest_counts():
    corrections = Corrections()
    one, other = device(100, name="A"), device(100, name="B")
    for measured in (900, 1300, 1100):
        corrections.learn(one, 1000, measured)
    assert corrections.extra_bytes(one) == 300
    assert corrections.extra_bytes(other) == 0
    assert kind_of(device(5, "cuda", name="H100")) == "cuda H100 9.0"


def test_what_was_learnt_survives_a_restart():
    corrections, again = Corrections(), Corrections()
    corrections.learn(device(1), 10, 30)
    again.restore(corrections.state())
    assert again.extra_bytes(device(1)) == 20
