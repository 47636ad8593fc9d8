"""Which updates are merged, and at which weight."""

import logging
from typing import Any

import pytest
import torch

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import Update
from rankfit.adapters.robust import length
from rankfit.configs.settings import Server
from rankfit.strategies.replies import Refused
from rankfit.strategies.screening import Screening, largest_weight

M = "layer.q"


def update(change: float, weight: float = 1.0, head: float = 0.1) -> Update:
    """A client that moved its factors and its head by so much."""
    b, a = torch.ones(4, 2), torch.ones(2, 3)
    given = Adapter({M: Factors(b, a)}, 1.0, {"head": torch.zeros(5)})
    trained = Adapter({M: Factors(b + change, a)}, 1.0, {"head": torch.full((5,), head)})
    return Update(given, trained, weight)


def screening(known: dict[str, int] | None = None, most: int = 0, **server: Any) -> Screening:
    own = Screening(Server(**server))
    own.know(known or {}, most)
    own.open()
    return own


def judge(own: Screening, updates: list[Update], trainable: Any, *clients: str) -> list[Any]:
    names = clients or [f"client-{number}" for number in range(len(updates))]
    return own.judge(names, updates, trainable)


def merged(judged: list[Any]) -> list[bool]:
    return [isinstance(one, Update) for one in judged]


def factors_of(one: Any) -> float:
    return length(one.given, one.trained).factors


def test_a_change_far_above_the_median_is_shortened_to_it_and_the_others_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A run in this process may have taken the logger out of the tree.
    logging.getLogger("rankfit.strategies.screening").addHandler(caplog.handler)
    own = screening(norm_limit=10.0)
    updates = [update(1.0), update(2.0), update(0.5), update(40.0), update(9.0)]
    judged = judge(own, updates, "both")
    kept = [one.trained is own.trained for one, own in zip(judged, updates, strict=True)]
    assert kept == [True, True, True, False, True]
    assert factors_of(judged[3]) == pytest.approx(factors_of(updates[1]), rel=1e-3)
    assert torch.equal(judged[3].trained.head["head"], updates[3].trained.head["head"])
    assert "client client-3: its change is longer than 10 medians of the round" in caplog.text
    against = judge(own, [*updates[:3], update(-40.0, head=-4.0), updates[4]], "both")
    assert merged(against) == [True, True, True, False, True]
    assert against[3].kind == "too long a change"


def test_factors_and_head_are_measured_apart() -> None:
    own = screening()
    judged = judge(own, [update(1.0) for _ in range(4)] + [update(1.0, head=30.0)], "both")
    assert float(judged[4].trained.head["head"][0]) == pytest.approx(0.1, rel=1e-3)
    assert judged[4].trained.factors[M].b.equal(update(1.0).trained.factors[M].b)


def test_a_limit_of_zero_is_none_and_an_absolute_one_holds_by_itself() -> None:
    many = [update(1.0) for _ in range(4)]
    assert merged(judge(screening(norm_limit=0.0), [*many, update(1e4)], "both")) == [True] * 5
    absolute = screening(norm_limit=0.0, max_update_norm=100.0)
    judged = judge(absolute, [update(1.0), update(1e4)], "both")
    assert merged(judged) == [True, False] and "server.max-update-norm" in str(judged[1])


def test_a_round_of_two_asks_what_was_merged_before_of_the_same_factors() -> None:
    own = screening()
    judge(own, [update(1.0) for _ in range(4)], "a")
    own.open()
    assert merged(judge(own, [update(100.0), update(100.0)], "b")) == [True, True]
    own.open()
    again = screening()
    again.restore(own.state())
    for each in (own, again):
        each.open()
        assert merged(judge(each, [update(100.0), update(1.5)], "a")) == [False, True]


def test_clipped_changes_are_as_long_as_the_median() -> None:
    own = screening(robust="norm-clipping")
    judged = judge(own, [update(1.0), update(2.0), update(200.0, head=9.0)], "both")
    assert merged(judged) == [True] * 3
    last = judged[2]
    assert isinstance(last, Update)
    assert float(last.trained.factors[M].b[0, 0]) == pytest.approx(3.0, rel=1e-3)
    assert float(last.trained.head["head"][0]) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("weights", "share"),
    [
        ([10, 12, 9, 11, 1e9, 1e9], 0.5),
        ([10, 12, 9, 11, 1e9], 0.3),
        ([1, 1, 1], 0.5),
        ([1, 1e6, 1], 0.4),
        ([3.0] * 9 + [1e18], 0.2),
    ],
)
def test_no_one_has_more_than_the_share_and_two_do_not_lift_each_other(
    weights: list[float], share: float
) -> None:
    most = largest_weight(weights, share)
    capped = [min(weight, most) for weight in weights]
    assert max(capped) / sum(capped) <= max(share, 2 / len(weights)) + 1e-9
    honest = sorted(weights)[: len(weights) // 2 + 1]
    assert most <= share / (1 - max(share, 2 / len(weights))) * len(weights) * max(honest) * 2


def test_of_one_or_two_clients_none_is_capped() -> None:
    assert largest_weight([1.0, 1e6], 0.5) == float("inf")
    assert largest_weight([5.0], 0.5) == largest_weight([], 0.5) == float("inf")


def test_samples_are_those_that_a_client_named_first() -> None:
    own = screening()
    assert own.weigh("a", update(1.0, 50.0), -1).weight == 50
    assert own.weigh("a", update(1.0, 1e9), -1).weight == 50
    assert own.weigh("a", update(1.0, 40.0), -1).weight == 40
    assert own.weigh("b", update(1.0, 60.0), 55).weight == 55, "its device report came first"
    strict = screening(sample_changes="refuse")
    strict.weigh("a", update(1.0, 50.0), -1)
    with pytest.raises(Refused, match="60 samples; it said 50 before"):
        strict.weigh("a", update(1.0, 60.0), -1)
    free = screening(sample_changes="accept")
    assert [free.weigh("a", update(1.0, n), -1).weight for n in (50.0, 70.0)] == [50, 70]


def test_what_the_server_knows_bounds_what_a_client_claims() -> None:
    own = screening({"partition-0": 30}, most=100)
    assert own.weigh("partition-0", update(1.0, 1e9), -1).weight == 30
    assert own.weigh("another", update(1.0, 1e9), -1).weight == 100


def test_samples_that_the_server_knows_count_in_full() -> None:
    """An uneven split is no attack: the limits must not change a run of honest clients."""
    own = screening({"partition-0": 5000, "partition-1": 20}, most=6000)
    updates = [update(1.0, 5000.0)] + [update(1.0, 20.0) for _ in range(5)]
    names = ["partition-0", *["partition-1"] * 5]
    assert [one.weight for one in judge(own, updates, "both", *names)] == [5000.0] + [20.0] * 5
    own.open()
    judged = judge(own, updates, "both")
    assert judged[0].weight == pytest.approx(50.0), "as a claim it is a third of the round"


def test_changes_that_point_against_the_others_are_left_out() -> None:
    own = screening(robust="cosine")
    judged = judge(own, [update(1.0), update(-2.0, head=-0.1), update(0.5), update(1.5)], "both")
    assert merged(judged) == [True, False, True, True] and judged[1].kind == "not chosen"
    assert merged(judge(own, [update(1.0), update(-1.0)], "both")) == [True, True], "no majority"


@pytest.mark.parametrize("robust", ["krum", "multi-krum", "geometric-median"])
def test_whole_updates_are_chosen_or_weighed(robust: str) -> None:
    own = screening(robust=robust, norm_limit=0.0)
    judged = judge(own, [update(1.0 + i / 10) for i in range(7)] + [update(50.0)], "both")
    kept = [one for one in judged if isinstance(one, Update)]
    if robust == "geometric-median":
        assert len(kept) == 8 and kept[-1].weight < 0.02 * sum(one.weight for one in kept)
    else:
        assert len(kept) == {"krum": 1, "multi-krum": 6}[robust] and not merged(judged)[-1]
