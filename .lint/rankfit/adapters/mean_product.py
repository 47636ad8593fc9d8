"""Merges in product space: the exact mean of the products, or of what clients changed in them."""

from dataclasses import replace

import torch
from torch import Tensor

from rankfit.adapters.merge import Merge, Update
from rankfit.adapters.product import START_ROW_NORM, ProductSum, refactor
from rankfit.adapters.state import Adapter, Factors

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
        self._weights = torch.zeros(like.rank, dtype=torch.float64)

    def take(self, factors: Factors, directions: Tensor | None, weight: float) -> bool:
        """Add a start; False, and nothing is added, if it differs from one that came before.

        Only starts of leading directions (``directions`` is None) are compared: they can be without
        a copy.
        """
        if directions is not None:
            return False
        rank, known = factors.rank, int((self._weights != 0).sum())
        both = min(rank, known)
        same = torch.equal(self._factors.b[:, :both], factors.b[:, :both]) and torch.equal(
            self._factors.a[:both], factors.a[:both]
        )
        if not same:
            return False
        self._factors.b[:, both:rank] = factors.b[:, both:]
        self._factors.a[both:rank] = factors.a[both:]
        self._weights[:rank] += weight
        return True

    def product(self) -> Factors:
        """The sum as one pair of factors."""
        return self._factors.weighted(self._weights)
