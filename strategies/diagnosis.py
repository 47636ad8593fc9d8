"""Figures of a round that tell why a method does well or badly; no training depends on them."""

import math
from collections.abc import Mapping

import torch

from rankfit.adapters.merge import Update
from rankfit.adapters.product import ProductSum
from rankfit.adapters.state import Adapter
from rankfit.strategies.start import Share


class Diagnosis:
    """Watches one round.

    Parameters
    ----------
    reference : Adapter
        The global adapter at its start.
    """

    def __init__(self, reference: Adapter) -> None:
        self._reference = reference
        self._given: list[float] = []
        self._mean = _sums(reference)
        self._change = _sums(reference)
        self._weight = 0.0

    def start(self, share: Share, folds: bool) -> None:
        """Note how far a client's start is from the global adapter (the folded part is exact)."""
        seen = [share.given] if folds or share.frozen is None else [share.given, share.frozen]
        difference = _sums(self._reference)
        for adapter, sign in [(self._reference, 1.0), *((own, -1.0) for own in seen)]:
            for module, factors in adapter.factors.items():
                difference[module].add(factors, sign * adapter.scale)
        whole = _norm(_summed(self._reference))
        self._given.append(_norm(difference) / whole if whole else 0.0)

    def see(self, update: Update) -> None:
        """Note an update that was merged."""
        self._weight += update.weight
        for module, factors in update.trained.factors.items():
            weight = update.weight * update.trained.scale
            self._mean[module].add(factors, weight)
            self._change[module].add(factors, weight)
            self._change[module].add(update.given.factors[module], -weight)

    def figures(
        self, merged: Adapter, residual: Adapter | None, after: Adapter
    ) -> dict[str, float]:
        """Figures of the round, from the merge, what it folded, and all that was learnt by then.

        ``truncation-error``: mean over the clients of ‖ΔW − start‖/‖ΔW‖. ``mean-error``: distance
        of the merge (with what was folded) from M = Σ w·s·B·A, relative to M. ``change-error``: the
        same for the change, from ΔW + Σ w·s·(B·A − B⁰·A⁰), relative to the mean change.
        ``effective-rank``: exp of the entropy of the energies σ²/Σσ², mean over the modules (1 =
        collapsed). ``top-energy``: share of the strongest direction. ``norm``: ‖ΔW‖.
        """
        found = {}
        if self._given:
            found["truncation-error"] = sum(self._given) / len(self._given)
        if self._weight:
            parts = [merged] if residual is None else [merged, residual]
            found["mean-error"] = self._distance(self._mean, parts, [])
            found["change-error"] = self._distance(self._change, parts, [self._reference])
        return found | spectrum_figures(after)

    def _distance(
        self, target: Mapping[str, ProductSum], after: list[Adapter], before: list[Adapter]
    ) -> float:
        """‖after − before − target‖ / ‖target‖; the target's sums are used up."""
        whole = _norm(target)
        for adapters, sign in ((after, -1.0), (before, 1.0)):
            for adapter in adapters:
                for module, own in adapter.factors.items():
                    target[module].add(own, sign * self._weight * adapter.scale)
        return _norm(target) / whole if whole else 0.0


def spectrum_figures(adapter: Adapter) -> dict[str, float]:
    """Energy of an adapter's spectrum, averaged over its modules; an untrained one is left out."""
    ranks, tops, norm = [], [], 0.0
    for sums in _summed(adapter).values():
        energies = sums.spectrum().values.square()
        total = float(energies.sum())
        norm += total
        if total <= 0:
            continue
        shares = energies[energies > 0] / total
        ranks.append(float(torch.exp(-(shares * shares.log()).sum())))
        tops.append(float(shares.max()))
    if not ranks:
        return {"norm": 0.0}
    return {
        "effective-rank": sum(ranks) / len(ranks),
        "top-energy": sum(tops) / len(tops),
        "norm": norm**0.5,
    }


def _sums(adapter: Adapter) -> dict[str, ProductSum]:
    return {m: ProductSum(f.b.shape[0], f.a.shape[1]) for m, f in adapter.factors.items()}


def _summed(adapter: Adapter) -> dict[str, ProductSum]:
    sums = _sums(adapter)
    for module, factors in adapter.factors.items():
        sums[module].add(factors, adapter.scale)
    return sums


def _norm(sums: Mapping[str, ProductSum]) -> float:
    return math.sqrt(sum(float(total.dense().square().sum()) for total in sums.values()))
