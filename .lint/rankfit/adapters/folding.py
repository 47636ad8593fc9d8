"""Merges that fold part of what was learnt into the base, and the folded part itself.

The base stays untouched on every machine (it may be quantised): the folded part is a frozen second
adapter that travels to the clients beside the trained one, and its bytes are counted. Its rank
grows from round to round up to min(d, k), where it is a full change of the weight.
"""

from collections.abc import Mapping

import torch

from rankfit.adapters.merge import AverageFactors, Merge, Update
from rankfit.adapters.state import Adapter, Factors, random_rows


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
