"""Merges in which a direction is averaged over the clients that trained it, and over them only.

A client that lacks a direction has no say in it, so it is not pulled towards zero. With one rank
for all owners of a module this is the plain average of that tensor over its owners.
"""

import torch

from rankfit.adapters.merge import Merge, Update, scatter, zeros_like
from rankfit.adapters.product import refactor
from rankfit.adapters.state import Adapter, Factors


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
    learnt. All updates are kept until the end, because W_j is known only then.
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
