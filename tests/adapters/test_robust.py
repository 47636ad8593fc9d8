"""Lengths, distances and robust merges against dense oracles, at mixed ranks."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import Update
from rankfit.adapters.product_merges import Refactored
from rankfit.adapters.robust import (
    Vote,
    agreeing,
    agreement,
    distances,
    geometric_median,
    grams,
    krum,
    length,
    scaled_gram,
    shortened,
)

MODULES = ("layer.q", "layer.v")
D, K, R, SCALE = 7, 5, 4, 2.0


def start() -> Adapter:
    draw = torch.Generator().manual_seed(0)
    factors = {
        m: Factors(torch.randn(D, R, generator=draw), torch.randn(R, K, generator=draw))
        for m in MODULES
    }
    return Adapter(factors, SCALE, {"head": torch.randn(3, generator=draw)})


def update(seed: int, rank: int, size: float = 0.1, weight: float = 1.0) -> Update:
    draw = torch.Generator().manual_seed(seed)
    before = start().cut(dict.fromkeys(MODULES, rank))

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + size * torch.randn(tensor.shape, generator=draw)

    factors = {m: Factors(moved(own.b), moved(own.a)) for m, own in before.factors.items()}
    head = {name: moved(tensor) for name, tensor in before.head.items()}
    return Update(before, Adapter(factors, SCALE, head), weight)


def dense(given: Adapter, trained: Adapter) -> torch.Tensor:
    """The change of all products, written out and laid end to end."""
    return torch.cat(
        [
            trained.scale
            * (
                own.b.double() @ own.a.double()
                - given.factors[m].b.double() @ given.factors[m].a.double()
            ).flatten()
            for m, own in trained.factors.items()
        ]
    )


RANKS = st.lists(st.integers(1, R), min_size=1, max_size=7)


@settings(max_examples=60)
@given(RANKS, st.floats(1e-4, 10))
def test_lengths_and_distances_are_those_of_dense_products(ranks: list[int], size: float) -> None:
    updates = [update(seed, rank, size) for seed, rank in enumerate(ranks)]
    changes = [dense(own.given, own.trained) for own in updates]
    heads = [(own.trained.head["head"] - own.given.head["head"]).double() for own in updates]
    factors, head = grams(updates)
    for i, own in enumerate(updates):
        found = length(own.given, own.trained)
        assert found.factors == pytest.approx(float(changes[i].norm()), rel=1e-6)
        assert found.head == pytest.approx(float(heads[i].norm()), rel=1e-5)
        for j in range(len(updates)):
            assert float(factors[i, j]) == pytest.approx(
                float(changes[i] @ changes[j]), rel=1e-5, abs=1e-6 * size
            )
            apart = float((changes[i] - changes[j]).square().sum())
            assert float(distances(factors)[i, j]) == pytest.approx(apart, rel=1e-5, abs=1e-7)
            assert float(head[i, j]) == pytest.approx(
                float(heads[i] @ heads[j]), rel=1e-4, abs=1e-9
            )


@settings(max_examples=40)
@given(st.integers(1, R), st.floats(0.01, 2.0), st.floats(0.01, 2.0))
def test_a_shortened_update_is_as_long_as_it_may_be(rank: int, factors: float, head: float) -> None:
    long = update(1, rank, 1.0)
    before, after = length(long.given, long.trained), shortened(long, factors, head)
    found = length(after.given, after.trained)
    assert found.factors == pytest.approx(min(factors, before.factors), rel=1e-3)
    assert found.head == pytest.approx(min(head, before.head), rel=1e-3)


def test_krum_by_the_scores_of_dense_distances() -> None:
    ranks = [1, 2, 4, 4, 3, 2, 4]
    updates = [update(seed, rank) for seed, rank in enumerate(ranks)]
    updates[2] = update(2, 4, size=5.0)
    changes = [dense(own.given, own.trained) for own in updates]
    heads = [(own.trained.head["head"] - own.given.head["head"]).double() for own in updates]
    total = torch.zeros(7, 7, dtype=torch.float64)
    for parts in (changes, heads):
        apart = torch.tensor(
            [[float((x - y).square().sum()) for y in parts] for x in parts], dtype=torch.float64
        )
        total += apart / apart[torch.triu_indices(7, 7, 1).unbind()].median()
    near = 7 - 2 - 2
    scores = [
        float(sum(sorted(row[:i] + row[i + 1 :])[:near])) for i, row in enumerate(total.tolist())
    ]
    order = krum(updates, 2)
    assert order == sorted(range(7), key=lambda i: scores[i])
    assert order[-1] == 2, "the one that is far from all others comes last"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_small_rounds_have_an_order_too(count: int) -> None:
    assert sorted(krum([update(i, 2) for i in range(count)], 3)) == list(range(count))


def test_those_who_agree_by_the_cosines_of_dense_changes() -> None:
    ranks = [1, 2, 4, 3, 2, 4, 3]
    updates = [update(seed // 3, rank, size=1.0 + seed) for seed, rank in enumerate(ranks)]
    kept = agreeing(updates)
    changes = [dense(own.given, own.trained).flatten() for own in updates]
    heads = [(own.trained.head["head"] - own.given.head["head"]).double() for own in updates]
    whole = []
    for parts in (changes, heads):
        apart = [float((x - y).square().sum()) for i, x in enumerate(parts) for y in parts[i + 1 :]]
        size = torch.tensor(apart).median().sqrt()
        whole.append(torch.stack(parts).double() / size)
    stacked = torch.nn.functional.normalize(torch.cat(whole, 1))
    left = list(range(7))
    while len(left) > 2:
        sums = [float(stacked[i] @ (stacked[left].sum(0) - stacked[i])) for i in left]
        if min(sums) >= 0:
            break
        del left[sums.index(min(sums))]
    assert kept == left and 2 <= len(kept) < 7
    others = [stacked.sum(0) - stacked[i] for i in range(7)]
    expected = [float(stacked[i] @ o / o.norm()) for i, o in enumerate(others)]
    assert agreement(updates) == pytest.approx(expected, abs=1e-5)


def test_the_geometric_median_is_where_the_distances_add_up_to_least() -> None:
    updates = [update(seed, 1 + seed % R, weight=1.0 + seed) for seed in range(6)]
    updates[0] = update(0, 4, size=50.0, weight=3.0)
    weights = torch.tensor(geometric_median(updates), dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(1.0)
    gram = scaled_gram(updates)

    def cost(w: torch.Tensor) -> float:
        square = (gram.diagonal() - 2 * gram @ w + w @ gram @ w).clamp(min=0)
        return sum(u.weight * float(s) ** 0.5 for u, s in zip(updates, square, strict=True))

    best = cost(weights)
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        nearby = weights + 0.05 * torch.randn(6, generator=draw, dtype=torch.float64)
        nearby = nearby.clamp(min=0)
        assert cost(nearby / nearby.sum()) >= best - 1e-6 * best
    assert float(weights[0]) < 0.05, "what is far away counts little, whatever it weighs"


def vote_oracle(changes: list[float], trimmed: float | None) -> float:
    votes = sorted(changes + [0.0] * max(0, 3 - len(changes)))
    most = (len(votes) - 1) // 2
    cut = most if trimmed is None else min(most, -int(-trimmed * len(votes) // 1))
    kept = votes[cut : len(votes) - cut]
    return sum(kept) / len(kept)


@settings(max_examples=30)
@given(RANKS, st.sampled_from([None, 0.0, 0.2, 0.4]))
def test_votes_number_by_number_of_those_who_trained_a_direction(
    ranks: list[int], trimmed: float | None
) -> None:
    updates = [update(seed, rank) for seed, rank in enumerate(ranks)]
    merge = Vote(start(), 0, trimmed=trimmed)
    for own in updates:
        merge.add(own)
    merged = merge.finish()
    for module in MODULES:
        before, after = start().factors[module], merged.factors[module]
        for direction in range(R):
            owners = [own for own in updates if own.trained.ranks[module] > direction]
            for row in range(D):
                moves = [
                    float(own.trained.factors[module].b[row, direction])
                    - float(own.given.factors[module].b[row, direction])
                    for own in owners
                ]
                expected = float(before.b[row, direction]) + (
                    vote_oracle(moves, trimmed) if owners else 0.0
                )
                assert float(after.b[row, direction]) == pytest.approx(expected, abs=1e-5)
    moves = [float(own.trained.head["head"][0] - own.given.head["head"][0]) for own in updates]
    expected = float(start().head["head"][0]) + vote_oracle(moves, trimmed)
    assert float(merged.head["head"][0]) == pytest.approx(expected, abs=1e-5)


def test_a_direction_that_one_client_alone_trained_does_not_move() -> None:
    merge = Vote(start(), 0, trimmed=None)
    for own in (update(1, 1), update(2, 1), update(3, 1), update(4, R, size=100.0)):
        merge.add(own)
    merged = merge.finish()
    for module in MODULES:
        assert torch.equal(merged.factors[module].b[:, 1:], start().factors[module].b[:, 1:])
        assert torch.equal(merged.factors[module].a[1:], start().factors[module].a[1:])


def test_votes_with_drawn_directions_go_to_their_places() -> None:
    whole = start()
    picked = torch.tensor([1, 3])
    part = Adapter(
        {m: Factors(f.b[:, picked], f.a[picked]) for m, f in whole.factors.items()},
        SCALE, whole.head,
    )  # fmt: skip
    moved = Adapter(
        {m: Factors(f.b + 1.0, f.a) for m, f in part.factors.items()}, SCALE, whole.head
    )
    merge = Vote(whole, 0, trimmed=None)
    for _ in range(3):
        merge.add(Update(part, moved, 1.0, dict.fromkeys(MODULES, picked)))
    merged = merge.finish()
    for module in MODULES:
        change = merged.factors[module].b - whole.factors[module].b
        assert torch.allclose(change[:, picked], torch.ones(D, 2))
        assert torch.equal(change[:, [0, 2]], torch.zeros(D, 2))


def test_a_vote_can_be_re_factorised() -> None:
    plain = Vote(start(), 0, trimmed=0.2)
    ordered = Refactored(start(), 0, inner=partial(Vote, trimmed=0.2))
    for own in (update(1, 2), update(2, 4), update(3, 3), update(4, 4)):
        plain.add(own)
        ordered.add(own)
    one, two = plain.finish(), ordered.finish()
    for module in MODULES:
        assert torch.allclose(
            one.factors[module].product(), two.factors[module].product(), atol=1e-4
        )
    assert torch.equal(one.head["head"], two.head["head"])
