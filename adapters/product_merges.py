"""Merges in product space: exact means, means over owners, and merges that fold into the base."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors, random_rows
from rankfit.adapters.merge import (
    START_ROW_NORM,
    AverageFactors,
    Merge,
    ProductSum,
    Update,
    refactor,
    scatter,
    zeros_like,
)

#: Strength ‖b‖·‖a‖ from which the row of a direction is damped: that of a direction whose factors
#: are both as long as a fresh row.
STRONG = START_ROW_NORM**2


class MeanProduct(Merge):
    """FlexLoRA: the weighted mean of the products, exactly, then its best rank-R approximation.

    Source: arXiv:2402.11505. Low-rank clients vote zero for every direction that they lack.
    """

    aligned = False

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._sums: dict[str, ProductSum] = {}

    def _add_factors(self, update: Update) -> None:
        for module, factors in update.trained.factors.items():
            self._sum(module).add(factors, update.weight * update.trained.scale)

    def _finish_module(self, module: str) -> Factors:
        # Last round's directions are a good guess at this round's.
        own, generator = self.reference.factors[module], self._generator(module)
        sums = self._sum(module)
        del self._sums[module]
        spectrum = sums.strongest(own.rank, self.tolerance, generator, start=own.a)
        return refactor(
            spectrum.scaled(1 / (self.total * self.reference.scale)), own.rank, generator
        )

    def _sum(self, module: str) -> ProductSum:
        if module not in self._sums:
            self._sums[module] = self._product_sum(module)
        return self._sums[module]


class MeanChange(MeanProduct):
    """ΔW + Σ w·s·(B·A − B⁰·A⁰), exactly, then its best rank-R approximation.

    B⁰·A⁰ is what the client was given. Only what clients changed is merged, so a direction that a
    low-rank client was never given stays as it is instead of being pulled to zero.

    What clients were given are mostly the same directions, so Σ w·s·B⁰·A⁰ is kept as one product
    with a weight for each direction, not as one product for each client.
    """

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._given = {module: Given(own) for module, own in reference.factors.items()}

    def _add_factors(self, update: Update) -> None:
        super()._add_factors(update)
        for module, factors in update.given.factors.items():
            weight = -update.weight * update.given.scale
            if not self._given[module].take(factors, update.indices.get(module), weight):
                self._sum(module).add(factors, weight)

    def _finish_module(self, module: str) -> Factors:
        own = self.reference.factors[module]
        self._sum(module).add(own, self.total * self.reference.scale)
        self._sum(module).add(self._given[module].product(), 1.0)
        return super()._finish_module(module)


class DampedChange(MeanChange):
    """RankFit: the mean change, with the rows of strong directions turned less than clients ask.

    A row that turns by δ changes the product by σ·δ, σ = ‖b‖·‖a‖. How far a client turns it is a
    matter of its learning rate and steps (Adam's are of one size), not of σ: the drift of a few
    clients moves the strongest directions most. A turn counts min(1, ``STRONG``/σ) times, so that
    it never changes the product more than that of a direction of strength ``STRONG``.
    """

    def _add_factors(self, update: Update) -> None:
        factors = {}
        for module, own in update.trained.factors.items():
            given = update.given.factors[module]
            strength = given.b.norm(dim=0) * given.a.norm(dim=1)  # (r,)
            counts = (STRONG / strength).clamp(max=1.0)  # ∞, so 1, for a direction of no strength
            factors[module] = Factors(own.b, given.a.lerp(own.a, counts[:, None]))
        trained = replace(update.trained, factors=factors)
        super()._add_factors(replace(update, trained=trained))


class Given:
    """Σ w·B⁰·A⁰ of starts that are the same directions wherever they overlap."""

    def __init__(self, like: Factors) -> None:
        self._factors = Factors(torch.zeros_like(like.b), torch.zeros_like(like.a))
        self._last: Factors | None = None
        self._weights = torch.zeros(like.rank, dtype=torch.float64)

    def take(self, factors: Factors, directions: Tensor | None, weight: float) -> bool:
        """Add a start; False, and nothing is added, if it differs from one that came before.

        Only starts of leading directions (``directions`` is None) are compared: they can be without
        a copy.
        """
        if directions is not None:
            return False
        rank = factors.rank
        if not self._begins_with(factors):
            known = int((self._weights != 0).sum())
            both = min(rank, known)
            same = torch.equal(self._factors.b[:, :both], factors.b[:, :both]) and torch.equal(
                self._factors.a[:both], factors.a[:both]
            )
            if not same:
                return False
            self._factors.b[:, both:rank] = factors.b[:, both:]
            self._factors.a[both:rank] = factors.a[both:]
            if rank > known:
                self._last = factors
        self._weights[:rank] += weight
        return True

    def _begins_with(self, factors: Factors) -> bool:
        """Whether these are the first directions of the longest start, in the same memory.

        Most clients are given views of one adapter, which then need not be read again.
        """
        last = self._last
        return (
            last is not None
            and factors.rank <= last.rank
            and _same_memory(last.b[:, : factors.rank], factors.b)
            and _same_memory(last.a[: factors.rank], factors.a)
        )

    def product(self) -> Factors:
        """The sum as one pair of factors."""
        return self._factors.weighted(self._weights)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one view of the same memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


class OwnersMean(Merge):
    """RBLA: B[:, j] = Σ_{i owns j} w_i·B_i[:, j] / Σ_{i owns j} w_i, and the same for rows of A.

    Sources: RBLA (arXiv:2408.08699), FediLoRA, HAFLQ; per tensor over its owners in LEGEND and
    Fed-HeLLo. A direction without an owner in this round stays as it is. Sums are of how far the
    factors are from the global ones: a factor that rests stays the same to the last bit.
    """

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._sums = zeros_like(reference)
        self._weights = {m: torch.zeros(own.rank) for m, own in reference.factors.items()}

    def _add_factors(self, update: Update) -> None:
        for module, factors in update.trained.factors.items():
            directions, own = update.directions(module), self.reference.factors[module]
            change = Factors(factors.b - own.b[:, directions], factors.a - own.a[directions])
            scatter(self._sums[module], directions, change, update.weight)
            self._weights[module][directions] += update.weight

    def _finish_module(self, module: str) -> Factors:
        own, total, weights = (
            self.reference.factors[module],
            self._sums[module],
            self._weights[module],
        )
        divisor = torch.where(weights > 0, weights, 1.0)
        return Factors(own.b + total.b / divisor, own.a + total.a / divisor[:, None])


class OwnersProduct(Merge):
    """RaFLoRA: Σ_j Σ_{i owns j} w_i/W_j · s·B_i[:, j]·A_i[j], then its best rank-R approximation.

    W_j is the weight of the clients that could train direction j. Where nobody could, the global
    direction itself stands in, so that a round of weak clients does not erase what strong ones
    learned. All updates are kept until the end, because W_j is known only then.
    """

    aligned = False

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._updates: list[Update] = []

    def _add_factors(self, update: Update) -> None:
        self._updates.append(update)

    def _finish_module(self, module: str) -> Factors:
        own = self.reference.factors[module]
        updates = [update for update in self._updates if module in update.trained.factors]
        weights = torch.zeros(own.rank, dtype=torch.float64)
        for update in updates:
            weights[update.directions(module)] += update.weight
        if not updates:
            return own
        total = self._product_sum(module)
        for update in updates:
            factors = update.trained.factors[module]
            share = update.weight / weights[update.directions(module)]
            total.add(factors.weighted(share), update.trained.scale / self.reference.scale)
        kept = weights == 0
        if bool(kept.any()):
            total.add(own.weighted(kept), 1.0)
        generator = self._generator(module)
        spectrum = total.strongest(own.rank, self.tolerance, generator, start=own.a)
        return refactor(spectrum, own.rank, generator)


class Refactored(Merge):
    """Another merge, then each product balanced: B = U√S, A = √S·Vᵀ (HRALoRA, CCGrid 2026).

    The product is untouched and its directions are ordered, so that a low-rank client gets the
    strongest. See :func:`rankfit.adapters.merge.refactor` for weak and dead directions.
    """

    aligned = False

    def __init__(
        self, reference: Adapter, seed: int, *, inner: Callable[[Adapter, int], Merge]
    ) -> None:
        super().__init__(reference, seed)
        self._inner = inner(reference, seed)

    def _add_factors(self, update: Update) -> None:
        self._inner.add(update)

    def finish(self) -> Adapter:
        """Return the inner merge's result, re-factorised."""
        self._inner.threads = self.threads
        self._merged = self._inner.finish()
        return super().finish()

    def _finish_head(self) -> dict[str, Tensor]:
        return dict(self._merged.head)

    def residual(self) -> Adapter | None:
        """Of the inner merge."""
        return self._inner.residual()

    def _finish_module(self, module: str) -> Factors:
        own = self._merged.factors[module]
        total = self._product_sum(module)
        total.add(own, 1.0)
        return refactor(total.spectrum(own.rank), own.rank, self._generator(module))


class Stacked(Merge):
    """FLoRA: all factors side by side, Σ w·s·B_i·A_i exactly, folded into the base each round.

    Source: arXiv:2409.05976. The next global adapter starts anew: A random, B zero.
    """

    aligned = False

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._terms: dict[str, list[tuple[float, Factors]]] = {m: [] for m in reference.factors}

    def _add_factors(self, update: Update) -> None:
        share = update.weight * update.trained.scale / self.reference.scale
        for module, factors in update.trained.factors.items():
            self._terms[module].append((share, factors))

    def _finish_module(self, module: str) -> Factors:
        own = self.reference.factors[module]
        k = own.a.shape[1]
        return Factors(torch.zeros_like(own.b), random_rows(own.rank, k, self._generator(module)))

    def residual(self) -> Adapter | None:
        """The stacked mean of the products, rank Σ r_i."""
        return _mean_of_terms(self._terms, self.total, self.reference)


class AverageAndResidual(AverageFactors):
    """FedEx-LoRA: the averages B̄, Ā go on, and M − B̄·Ā is folded into the base: exact.

    Source: arXiv:2410.09432.
    """

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._terms: dict[str, list[tuple[float, Factors]]] = {m: [] for m in reference.factors}

    def _add_factors(self, update: Update) -> None:
        super()._add_factors(update)
        for module, factors in update.trained.factors.items():
            self._terms[module].append((update.weight, factors))

    def residual(self) -> Adapter | None:
        """M − B̄·Ā, rank (clients + 1)·r."""
        terms = {
            module: [*found, (-self.total, self._averages(module))] if found else []
            for module, found in self._terms.items()
        }
        return _mean_of_terms(terms, self.total, self.reference)


def _mean_of_terms(
    terms: Mapping[str, list[tuple[float, Factors]]], total: float, reference: Adapter
) -> Adapter | None:
    """Σ w·B·A / total as factors of stacked rank, at the scale of the reference."""
    factors = {
        module: Factors(
            torch.cat([f.b * (weight / total) for weight, f in found], 1),
            torch.cat([f.a for _, f in found], 0),
        )
        for module, found in terms.items()
        if found
    }
    return Adapter(factors, reference.scale) if factors else None


def fold(folded: Adapter | None, residual: Adapter | None) -> Adapter | None:
    """Add a residual to what was folded before, exactly; a rank never passes min(d, k).

    Raises
    ------
    ValueError
        If the two have different scales.
    """
    if residual is None:
        return folded
    if folded is not None and folded.scale != residual.scale:
        raise ValueError(f"scales {folded.scale} and {residual.scale} cannot be folded together")
    before = {} if folded is None else dict(folded.factors)
    for module, factors in residual.factors.items():
        before[module] = compact(beside(before.get(module), factors))
    return Adapter(before, residual.scale)


def beside(left: Factors | None, right: Factors) -> Factors:
    """Directions of two pairs as one: its product is the sum of their products."""
    if left is None:
        return right
    return Factors(torch.cat([left.b, right.b], 1), torch.cat([left.a, right.a], 0))


def join(adapter: Adapter, frozen: Adapter | None) -> Adapter:
    """An adapter with the directions of a frozen one behind its own; the head stays."""
    if frozen is None:
        return adapter
    if frozen.factors and frozen.scale != adapter.scale:
        raise ValueError(f"scales {adapter.scale} and {frozen.scale} cannot be joined")
    factors = dict(adapter.factors)
    for module, own in frozen.factors.items():
        factors[module] = beside(factors.get(module), own)
    return Adapter(factors, adapter.scale, adapter.head)


def compact(factors: Factors) -> Factors:
    """The same product at rank at most min(d, k), without an SVD: one side becomes the identity."""
    d, k = factors.b.shape[0], factors.a.shape[1]
    if factors.rank <= min(d, k):
        return factors
    product = (factors.b.double() @ factors.a.double()).float()
    return Factors(product, torch.eye(k)) if k <= d else Factors(torch.eye(d), product)
