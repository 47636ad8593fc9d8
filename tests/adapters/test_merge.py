"""Merging against a slow exact oracle: dense matrices in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import (
    START_ROW_NORM,
    AverageFactors,
    Merge,
    PaddedChange,
    ProductSum,
    Update,
    ZeroPadded,
    product_norm,
    refactor,
)
from rankfit.adapters.product_merges import MeanChange, MeanProduct
from tests.adapters.oracle import best

MODULE = "layer.q"
TOLERANCE = 1e-5  # relative, float32 factors


def random_factors(d: int, k: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(d, rank, generator=generator), torch.randn(rank, k, generator=generator)
    )


def adapter(factors: Factors, scale: float) -> Adapter:
    return Adapter({MODULE: factors}, scale, {"classifier.bias": torch.zeros(3)})


def dense(value: Adapter) -> torch.Tensor:
    factors = value.factors[MODULE]
    return value.scale * factors.b.double() @ factors.a.double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def fold(
    kind: Callable[[Adapter, int], Merge], start: Adapter, updates: Sequence[Update]
) -> Adapter:
    merge = kind(start, 7)
    for update in updates:
        merge.add(update)
    return merge.finish()


@st.composite
def federations(draw: st.DrawFn) -> tuple[Adapter, list[Update]]:
    d, k = draw(st.integers(3, 24)), draw(st.integers(3, 24))
    rank = draw(st.integers(1, min(d, k)))
    scale = draw(st.sampled_from([0.25, 1.0, 2.0, 16.0]))
    seed = draw(st.integers(0, 10**6))
    start = adapter(random_factors(d, k, rank, seed), scale)
    updates = []
    for client in range(draw(st.integers(1, 5))):
        own = draw(st.integers(1, rank))
        own_scale = draw(st.sampled_from([scale, 0.5, 3.0]))
        moved = random_factors(d, k, own, seed + 1 + client)
        given_part = start.cut({MODULE: own})
        before = given_part.factors[MODULE]
        after = Factors(before.b + 0.3 * moved.b, before.a + 0.3 * moved.a)
        samples = float(draw(st.integers(1, 500)))
        updates.append(Update(given_part, adapter(after, own_scale), samples))
    return start, updates


@settings(deadline=None, max_examples=150)
@given(federations())
def test_mean_product_is_the_best_approximation_of_the_weighted_mean(
    case: tuple[Adapter, list[Update]],
) -> None:
    start, updates = case
    total = sum(update.weight for update in updates)
    mean = sum(update.weight / total * dense(update.trained) for update in updates)
    assert isinstance(mean, torch.Tensor)
    rank = start.factors[MODULE].rank
    merged = fold(MeanProduct, start, updates)
    assert merged.factors[MODULE].rank == rank
    assert error(dense(merged), best(mean, rank)) <= TOLERANCE


@settings(deadline=None, max_examples=150)
@given(federations())
def test_mean_change_is_the_best_approximation_of_the_start_plus_the_weighted_change(
    case: tuple[Adapter, list[Update]],
) -> None:
    start, updates = case
    total = sum(update.weight for update in updates)
    exact = dense(start) + sum(
        update.weight / total * (dense(update.trained) - dense(update.given)) for update in updates
    )
    rank = start.factors[MODULE].rank
    assert error(dense(fold(MeanChange, start, updates)), best(exact, rank)) <= TOLERANCE


@settings(deadline=None, max_examples=60)
@given(federations(), st.sampled_from([MeanProduct, MeanChange]), st.randoms())
def test_the_order_of_arrival_does_not_matter(
    case: tuple[Adapter, list[Update]], kind: Callable[[Adapter, int], Merge], shuffle: object
) -> None:
    start, updates = case
    other = list(updates)
    shuffle.shuffle(other)  # type: ignore[attr-defined]
    one, two = fold(kind, start, updates), fold(kind, start, other)
    assert error(dense(one), dense(two)) <= TOLERANCE


@settings(deadline=None, max_examples=60)
@given(federations(), st.sampled_from(["a", "b"]))
def test_padded_changes_are_exact_when_one_factor_moves(
    case: tuple[Adapter, list[Update]], trainable: str
) -> None:
    start, updates = case
    kept = []
    for update in updates:
        before, after = update.given.factors[MODULE], update.trained.factors[MODULE]
        factors = Factors(before.b, after.a) if trainable == "a" else Factors(after.b, before.a)
        kept.append(Update(update.given, adapter(factors, start.scale), update.weight))
    total = sum(update.weight for update in kept)
    exact = dense(start) + sum(
        update.weight / total * (dense(update.trained) - dense(update.given)) for update in kept
    )
    assert error(dense(fold(PaddedChange, start, kept)), exact) <= TOLERANCE


@pytest.mark.parametrize(
    "kind", [AverageFactors, ZeroPadded, MeanProduct, MeanChange, PaddedChange]
)
def test_one_client_that_changes_nothing_changes_nothing(
    kind: Callable[[Adapter, int], Merge],
) -> None:
    start = adapter(random_factors(9, 6, 4, 1), 2.0)
    merged = fold(kind, start, [Update(start, start, 10.0)])
    assert error(dense(merged), dense(start)) <= TOLERANCE


@pytest.mark.parametrize(
    "kind", [AverageFactors, ZeroPadded, MeanProduct, MeanChange, PaddedChange]
)
def test_no_update_leaves_the_global_adapter_as_it_is(
    kind: Callable[[Adapter, int], Merge],
) -> None:
    start = adapter(random_factors(9, 6, 4, 1), 2.0)
    assert kind(start, 0).finish() is start


def test_zero_padding_weights_by_the_norm_of_the_product() -> None:
    start = adapter(random_factors(8, 5, 3, 1), 1.0)
    small, large = random_factors(8, 5, 1, 2), random_factors(8, 5, 3, 3)
    updates = [
        Update(start.cut({MODULE: 1}), adapter(small, 1.0), 1.0),
        Update(start, adapter(large, 1.0), 99.0),
    ]
    norms = [float((f.b.double() @ f.a.double()).norm()) for f in (small, large)]
    weights = [norm / sum(norms) for norm in norms]
    b = weights[1] * large.b.double()
    b[:, :1] += weights[0] * small.b.double()
    merged = fold(ZeroPadded, start, updates).factors[MODULE]
    assert torch.allclose(merged.b.double(), b, rtol=1e-5, atol=1e-6)
    assert float(product_norm(small)) == pytest.approx(norms[0])


def test_plain_averages_are_weighted_by_samples_and_not_the_mean_of_the_products() -> None:
    start = adapter(random_factors(8, 5, 2, 1), 1.0)
    one, two = random_factors(8, 5, 2, 2), random_factors(8, 5, 2, 3)
    updates = [Update(start, adapter(one, 1.0), 1.0), Update(start, adapter(two, 1.0), 3.0)]
    merged = fold(AverageFactors, start, updates).factors[MODULE]
    assert torch.allclose(merged.b, 0.25 * one.b + 0.75 * two.b, atol=1e-6)
    assert torch.allclose(merged.a, 0.25 * one.a + 0.75 * two.a, atol=1e-6)
    mean = 0.25 * one.product() + 0.75 * two.product()
    assert float((merged.product() - mean).norm() / mean.norm()) > 0.1


def test_plain_averages_refuse_mixed_ranks() -> None:
    start = adapter(random_factors(8, 5, 3, 1), 1.0)
    merge = AverageFactors(start, 0)
    merge.add(Update(start, start, 1.0))
    part = start.cut({MODULE: 2})
    with pytest.raises(ValueError, match="choose a method for mixed ranks"):
        merge.add(Update(part, part, 1.0))


@pytest.mark.parametrize(
    "kind", [AverageFactors, ZeroPadded, MeanProduct, MeanChange, PaddedChange]
)
@pytest.mark.parametrize(
    "shape", [(1, 5, 1), (8, 1, 1), (8, 5, 4), (5, 8, 2)], ids=["d=1", "k=1", "rank", "transposed"]
)
def test_foreign_shapes_are_refused_and_never_broadcast(
    kind: Callable[[Adapter, int], Merge], shape: tuple[int, int, int]
) -> None:
    d, k, rank = shape
    start = adapter(random_factors(8, 5, 3, 1), 1.0)
    wrong = adapter(random_factors(d, k, rank, 2), 1.0)
    merge = kind(start, 0)
    with pytest.raises(ValueError, match="does not fit"):
        merge.add(Update(wrong, wrong, 1.0))
    assert merge.finish() is start, "a refused update leaves no trace"


def test_a_rank_one_update_touches_one_direction_only() -> None:
    start = adapter(random_factors(8, 5, 3, 1), 1.0)
    given_part = start.cut({MODULE: 1})
    moved = random_factors(8, 5, 1, 2)
    merged = fold(PaddedChange, start, [Update(given_part, adapter(moved, 1.0), 1.0)])
    assert torch.equal(merged.factors[MODULE].b[:, 1:], start.factors[MODULE].b[:, 1:])
    assert torch.equal(merged.factors[MODULE].a[1:], start.factors[MODULE].a[1:])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_that_are_not_positive_are_refused(weight: float) -> None:
    start = adapter(random_factors(8, 5, 3, 1), 1.0)
    with pytest.raises(ValueError, match="cannot be merged"):
        MeanChange(start, 0).add(Update(start, start, weight))


def test_heads_are_averaged_by_samples_whatever_the_method() -> None:
    start = adapter(random_factors(8, 5, 3, 1), 1.0)

    def with_head(value: float) -> Adapter:
        return Adapter(start.factors, 1.0, {"classifier.bias": torch.full((3,), value)})

    updates = [Update(start, with_head(1.0), 1.0), Update(start, with_head(5.0), 3.0)]
    for kind in (AverageFactors, ZeroPadded, MeanProduct, MeanChange, PaddedChange):
        assert torch.allclose(
            fold(kind, start, updates).head["classifier.bias"], torch.full((3,), 4.0)
        )


def test_a_dead_direction_stays_trainable() -> None:
    """Plain balanced factors of a product of low rank are zero in the tail, for ever."""
    products = ProductSum(8, 6)
    products.add(random_factors(8, 6, 2, 1), 1.0)
    factors = refactor(products.spectrum(4), 4, torch.Generator().manual_seed(0))
    assert error(factors.b.double() @ factors.a.double(), products.dense()) <= TOLERANCE
    assert torch.equal(factors.b[:, 2:], torch.zeros(8, 2))
    assert bool((factors.a[2:].norm(dim=1) > 0.1).all()), "A must let a gradient through to B"


def test_weak_directions_keep_the_row_norm_of_a_fresh_start() -> None:
    products = ProductSum(8, 6)
    products.add(random_factors(8, 6, 3, 1), 1e-4)
    factors = refactor(products.spectrum(3), 3, torch.Generator().manual_seed(0))
    assert torch.allclose(factors.a.norm(dim=1), torch.full((3,), START_ROW_NORM), rtol=1e-5)
    assert error(factors.b.double() @ factors.a.double(), products.dense()) <= TOLERANCE


def test_directions_are_ordered_so_that_a_cut_is_the_best_approximation() -> None:
    products = ProductSum(12, 9)
    products.add(random_factors(12, 9, 7, 1), 1.0)
    factors = refactor(products.spectrum(7), 7, torch.Generator().manual_seed(0))
    for rank in range(1, 8):
        part = factors.cut(0, rank)
        assert error(part.b.double() @ part.a.double(), best(products.dense(), rank)) <= TOLERANCE
