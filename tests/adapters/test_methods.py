"""Every merge of the catalogue against a dense oracle written from its paper's formula.

The oracles use loops over clients and directions in float64, at mixed ranks, with scales and
numbers of samples that differ.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import AverageFactors, Merge, PaddedChange, Update, ZeroPadded
from rankfit.adapters.product_merges import (
    STRONG,
    AverageAndResidual,
    DampedChange,
    MeanChange,
    MeanProduct,
    OwnersMean,
    OwnersProduct,
    Refactored,
    Stacked,
    compact,
    fold,
    join,
)
from tests.adapters.oracle import best

D, K, R, SCALE = 14, 11, 6, 2.5
RANKS, SAMPLES = (1, 2, 4, 6, 2), (30.0, 7.0, 11.0, 90.0, 50.0)
M = "layer.q"


def draw(d: int, k: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(d, rank, generator=generator), torch.randn(rank, k, generator=generator)
    )


def federation(
    ranks: tuple[int, ...] = RANKS, trainable: str = "both"
) -> tuple[Adapter, list[Update]]:
    reference = Adapter({M: draw(D, K, R, 0)}, SCALE)
    updates = []
    for client, (rank, samples) in enumerate(zip(ranks, SAMPLES, strict=False)):
        given = reference.cut({M: rank})
        before, step = given.factors[M], draw(D, K, rank, 1 + client)
        after = Factors(
            before.b + (step.b if trainable != "a" else 0),
            before.a + (step.a if trainable != "b" else 0),
        )
        updates.append(Update(given, Adapter({M: after}, SCALE), samples))
    return reference, updates


def run(kind: Callable[[Adapter, int], Merge], reference: Adapter, updates: list[Update]) -> Merge:
    merge = kind(reference, 3)
    for update in updates:
        merge.add(update)
    return merge


def dense(adapter: Adapter) -> Tensor:
    own = adapter.factors[M]
    return adapter.scale * own.b.double() @ own.a.double()


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected).norm() / expected.norm()) < 1e-5


def weights() -> list[float]:
    return [samples / sum(SAMPLES) for samples in SAMPLES]


def true_mean(updates: list[Update]) -> Tensor:
    total = sum(update.weight for update in updates)
    mean = torch.zeros(D, K, dtype=torch.float64)
    for update in updates:
        mean += update.weight / total * dense(update.trained)
    return mean


def test_rbla_averages_each_direction_over_its_owners_only() -> None:
    reference, updates = federation((1, 2, 4, 4, 2))
    merged = run(OwnersMean, reference, updates).finish().factors[M]
    for j in range(R):
        owners = [u for u in updates if u.trained.factors[M].rank > j]
        if not owners:
            assert torch.equal(merged.b[:, j], reference.factors[M].b[:, j])
            assert torch.equal(merged.a[j], reference.factors[M].a[j])
            continue
        total = sum(u.weight for u in owners)
        b, a = torch.zeros(D, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
        for u in owners:
            b += u.weight / total * u.trained.factors[M].b[:, j].double()
            a += u.weight / total * u.trained.factors[M].a[j].double()
        assert close(merged.b[:, j], b) and close(merged.a[j], a)


def test_layers_that_some_clients_lack_are_averaged_over_those_that_have_them() -> None:
    """LEGEND, Fed-HeLLo: a client without a layer has no say in it."""
    factors = {f"layer.{i}": draw(D, K, R, i) for i in range(3)}
    reference = Adapter(factors, SCALE)
    merge = OwnersMean(reference, 0)
    sent: dict[str, list[tuple[float, Factors]]] = {name: [] for name in factors}
    for client, names in enumerate((("layer.2",), ("layer.1", "layer.2"), ("layer.2",))):
        own = {name: draw(D, K, R, 10 * client + int(name[-1]) + 5) for name in names}
        merge.add(Update(reference.cut(dict.fromkeys(names, R)), Adapter(own, SCALE), client + 1.0))
        for name in names:
            sent[name].append((client + 1.0, own[name]))
    merged = merge.finish()
    assert torch.equal(merged.factors["layer.0"].b, factors["layer.0"].b)
    for name in ("layer.1", "layer.2"):
        total = sum(weight for weight, _ in sent[name])
        b = sum(weight / total * f.b.double() for weight, f in sent[name])
        assert isinstance(b, Tensor) and close(merged.factors[name].b, b)


def test_raflora_weights_each_direction_over_the_clients_that_could_train_it() -> None:
    reference, updates = federation((1, 2, 4, 5, 2))
    exact = torch.zeros(D, K, dtype=torch.float64)
    for j in range(R):
        owners = [u for u in updates if u.trained.factors[M].rank > j]
        total = sum(u.weight for u in owners)
        for u in owners:
            f = u.trained.factors[M]
            exact += u.weight / total * SCALE * torch.outer(f.b[:, j].double(), f.a[j].double())
        if not owners:
            f = reference.factors[M]
            exact += SCALE * torch.outer(f.b[:, j].double(), f.a[j].double())
    assert close(dense(run(OwnersProduct, reference, updates).finish()), best(exact, R))


def test_flexlora_truncates_for_each_client() -> None:
    """HRALoRA's FlexLoRA baseline computes the truncation and then uses the untruncated values."""
    reference, updates = federation()
    merged = run(MeanProduct, reference, updates).finish()
    mean = true_mean(updates)
    for rank in range(1, R + 1):
        part = merged.cut({M: rank})
        assert part.factors[M].rank == rank
        assert close(dense(part), best(mean, rank))


def test_the_right_factor_is_the_transpose_of_v() -> None:
    """RB-LoRA uses V for Vᵀ, APPFL factors the transpose: a square product shows both."""
    product = draw(9, 9, 4, 1)
    reference = Adapter({M: draw(9, 9, 4, 0)}, SCALE)
    merged = run(MeanProduct, reference, [Update(reference, Adapter({M: product}, SCALE), 3.0)])
    found = merged.finish().factors[M]
    assert close(found.b.double() @ found.a.double(), product.b.double() @ product.a.double())


def test_products_are_averaged_with_their_scale_whatever_the_rank() -> None:
    """NVFlare averages raw B·A though alpha is fixed, so that a client's scale is alpha / r_i.

    Its server then applies alpha / R to Σ w·B·A: client i counts r_i / R of what it should.
    """
    reference, updates = federation()
    assert {update.trained.scale for update in updates} == {SCALE}, "one scale at every rank"
    mean = true_mean(updates)
    floor = float((best(mean, R) - mean).norm() / mean.norm())
    ours = dense(run(MeanProduct, reference, updates).finish())
    assert float((ours - mean).norm() / mean.norm()) == pytest.approx(floor, rel=1e-4)
    raw = torch.zeros_like(mean)
    for weight, update, rank in zip(weights(), updates, RANKS, strict=True):
        raw += weight * rank / R * dense(update.trained)
    assert float((best(raw, R) - mean).norm() / mean.norm()) > floor + 0.1


def test_averages_are_divided() -> None:
    """FLoRA's repository leaves FedIT un-averaged: 0.333 instead of 2.0 on such an example."""
    one = torch.ones(D, 2)
    reference = Adapter({M: Factors(one * 0, torch.ones(2, K))}, 1.0)

    def client(value: float) -> Update:
        return Update(reference, Adapter({M: Factors(one * value, torch.ones(2, K))}, 1.0), 10.0)

    merged = run(AverageFactors, reference, [client(1.0), client(2.0), client(3.0)]).finish()
    assert torch.allclose(merged.factors[M].b, one * 2.0)


def test_rank_equal_to_a_width_is_not_taken_for_the_other_axis() -> None:
    """FLoRA's repository guesses the axis by ``shape[0] == rank``."""
    reference = Adapter({M: draw(4, 4, 4, 0)}, SCALE)
    trained = Adapter({M: draw(4, 4, 2, 1)}, SCALE)
    merge = run(Stacked, reference, [Update(reference.cut({M: 2}), trained, 2.0)] * 3)
    merge.finish()
    residual = merge.residual()
    assert residual is not None and close(dense(residual), dense(trained))


@pytest.mark.parametrize("trainable", ["a", "b"])
@pytest.mark.parametrize("kind", [AverageFactors, PaddedChange], ids=["one-rank", "mixed"])
def test_alternation_is_exact(kind: Callable[[Adapter, int], Merge], trainable: str) -> None:
    """FFA-LoRA, RoLoRA at one rank; alternating at mixed ranks: ΔW + Σ w·s·(B·A − B⁰·A⁰)."""
    reference, updates = federation((3,) * 5 if kind is AverageFactors else RANKS, trainable)
    exact = dense(reference)
    for weight, update in zip(weights(), updates, strict=True):
        exact = exact + weight * (dense(update.trained) - dense(update.given))
    assert close(dense(run(kind, reference, updates).finish()), exact)


def test_flora_keeps_the_exact_mean_in_the_base_and_starts_anew() -> None:
    reference, updates = federation()
    merge = run(Stacked, reference, updates)
    merged, residual = merge.finish(), merge.residual()
    assert residual is not None and residual.factors[M].rank == sum(RANKS)
    assert close(dense(residual), true_mean(updates))
    assert not merged.factors[M].b.any() and merged.factors[M].a.norm() > 0.1
    assert not torch.equal(merged.factors[M].a, Stacked(reference, 4)._finish_module(M).a)


def test_fedex_folds_what_the_averages_miss() -> None:
    reference, updates = federation((3,) * 5)
    merge = run(AverageAndResidual, reference, updates)
    merged, residual = merge.finish(), merge.residual()
    assert residual is not None
    b = sum(w * u.trained.factors[M].b.double() for w, u in zip(weights(), updates, strict=True))
    assert isinstance(b, Tensor) and close(merged.factors[M].b[:, :3], b)
    assert close(dense(merged.cut({M: 3})) + dense(residual), true_mean(updates))
    error = float((dense(merged.cut({M: 3})) - true_mean(updates)).norm())
    assert error / float(true_mean(updates).norm()) > 0.1, "the averages alone are far off"


def test_folding_is_exact_over_many_rounds_and_its_rank_is_bounded() -> None:
    folded, exact = None, torch.zeros(D, K, dtype=torch.float64)
    for number in range(8):
        residual = Adapter({M: draw(D, K, 5, number)}, SCALE)
        folded, exact = fold(folded, residual), exact + dense(residual)
    assert folded is not None and folded.factors[M].rank == min(D, K)
    assert close(dense(folded), exact)
    tall = compact(draw(5, 9, 20, 1))
    assert tall.rank == 5 and close(tall.product(), draw(5, 9, 20, 1).product().double())
    trained = Adapter({M: draw(D, K, 2, 50)}, SCALE)
    assert close(dense(join(trained, folded)), dense(trained) + exact)


def test_fslora_scatters_changes_back_to_the_drawn_directions() -> None:
    """Only k_i columns of B and the same rows of A move; a direction not drawn is a change of 0."""
    reference, _ = federation()
    own = reference.factors[M]
    merge = PaddedChange(reference, 0)
    b, a = own.b.double().clone(), own.a.double().clone()
    draws = ([5, 0], [2], [0, 3, 4])
    for client, (indices, weight) in enumerate(zip(draws, weights()[:3], strict=True)):
        drawn = torch.tensor(indices)
        given = Adapter({M: Factors(own.b[:, drawn], own.a[drawn])}, SCALE * R / len(indices))
        step = draw(D, K, len(indices), 20 + client)
        after = Factors(given.factors[M].b + step.b, given.factors[M].a + step.a)
        merge.add(Update(given, Adapter({M: after}, given.scale), SAMPLES[client], {M: drawn}))
        share = weight / sum(weights()[:3])
        for position, j in enumerate(indices):
            b[:, j] += share * step.b[:, position].double()
            a[j] += share * step.a[position].double()
    merged = merge.finish().factors[M]
    assert close(merged.b, b) and close(merged.a, a)
    assert torch.equal(merged.b[:, 1], own.b[:, 1]) and torch.equal(merged.a[1], own.a[1])


@pytest.mark.parametrize("drawn", [[0, 0], [0, 9], [-1, 2], [1]])
def test_directions_that_make_no_sense_are_refused(drawn: list[int]) -> None:
    reference, _ = federation()
    part = reference.cut({M: 2})
    with pytest.raises(ValueError, match="directions"):
        PaddedChange(reference, 0).add(Update(part, part, 1.0, {M: torch.tensor(drawn)}))


def test_refactorisation_keeps_the_product_and_balances_it() -> None:
    reference, updates = federation(trainable="b")
    plain = run(OwnersMean, reference, updates).finish()
    merged = run(partial(Refactored, inner=OwnersMean), reference, updates).finish()
    assert close(dense(merged), dense(plain))
    own = merged.factors[M]
    values = torch.linalg.svdvals(own.b.double() @ own.a.double())[:R]
    assert close(own.b.norm(dim=0), values.sqrt()) and close(own.a.norm(dim=1), values.sqrt())
    for rank in range(1, R):
        assert close(dense(merged.cut({M: rank})), best(dense(plain), rank))


def test_refactorisation_never_kills_a_direction() -> None:
    """HRALoRA: B = 0 in an untrained direction gives A = 0 too, a zero gradient for ever."""
    own = draw(D, K, R, 0)
    own.b[:, 2:] = 0
    reference = Adapter({M: own}, SCALE)
    merge = run(
        partial(Refactored, inner=OwnersMean),
        reference,
        [Update(reference, reference, 5.0)],
    )
    merged = merge.finish().factors[M]
    assert close(merged.b.double() @ merged.a.double(), own.b.double() @ own.a.double())
    assert bool((merged.a.norm(dim=1) > 0.1).all())


@pytest.mark.parametrize("shrink", [1.0, 0.05])
def test_turns_of_strong_rows_are_damped(shrink: float) -> None:
    """ΔW + Σ w·s·(B·A* − B⁰·A⁰), row i of A* = a⁰ + min(1, STRONG/‖b⁰‖‖a⁰‖)·(a − a⁰)."""
    whole, updates = federation()
    own = whole.factors[M]
    reference = Adapter({M: Factors(own.b * shrink, own.a)}, SCALE)
    updates = [
        Update(reference.cut(u.given.ranks), u.trained, u.weight, u.indices) for u in updates
    ]
    total = dense(reference).clone()
    for update in updates:
        weight = update.weight / sum(u.weight for u in updates)
        before, after = update.given.factors[M], update.trained.factors[M]
        for i in range(before.rank):
            b, a = before.b[:, i].double(), before.a[i].double()
            counts = min(1.0, STRONG / float(b.norm() * a.norm()))
            turned = a + counts * (after.a[i].double() - a)
            total += weight * SCALE * torch.outer(after.b[:, i].double(), turned)
            total -= weight * SCALE * torch.outer(b, a)
    merged = run(DampedChange, reference, updates).finish()
    assert close(dense(merged), best(total, R))


def test_weak_rows_turn_as_far_as_clients_ask() -> None:
    """B = 0 at the start of training: nothing is damped, and nothing is divided by zero."""
    reference, updates = federation()
    own = reference.factors[M]
    start = Adapter({M: Factors(torch.zeros_like(own.b), own.a)}, SCALE)
    updates = [Update(start.cut(u.given.ranks), u.trained, u.weight) for u in updates]
    damped, plain = (run(kind, start, updates).finish() for kind in (DampedChange, MeanChange))
    assert torch.equal(dense(damped), dense(plain))


ALL = [
    AverageFactors, ZeroPadded, MeanProduct, MeanChange, DampedChange, PaddedChange, OwnersMean,
    OwnersProduct, Stacked, AverageAndResidual, partial(Refactored, inner=OwnersMean),
]  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_an_empty_round_changes_nothing(kind: Callable[[Adapter, int], Merge]) -> None:
    reference, _ = federation()
    merge = kind(reference, 0)
    assert merge.finish() is reference and merge.residual() is None


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not ZeroPadded])
def test_weights_are_samples(kind: Callable[[Adapter, int], Merge]) -> None:
    """HRALoRA's ``num_samples`` counts batches: a client of 33 samples weighs as one of 64."""
    reference, updates = federation((3, 3))
    merge = run(kind, reference, updates)
    twice = run(kind, reference, [u for u in updates for _ in range(2)])
    ratio = run(kind, reference, [Update(u.given, u.trained, u.weight / 10) for u in updates])
    expected = [merge.finish(), merge.residual()]
    for other in (twice, ratio):
        for left, right in zip(expected, [other.finish(), other.residual()], strict=True):
            if left is not None and right is not None and float(dense(left).norm()):
                assert close(dense(right), dense(left))
