"""Figures of a round that tell why a method does well or badly; no training depends on them."""

import math

import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import Update
from rankfit.strategies.start import Share

#: Up to this many columns a sketch is exact.
EXACT = 64
#: Random vectors of a sketch.
VECTORS = 16


class Sketch:
    """Σ w·B·A seen through a few random vectors: its norm, without the matrix or its terms.

    ‖M·Ω‖_F is an unbiased estimate of ‖M‖_F in squares for Ω (k, p) with E[Ω·Ωᵀ] = 1; up to
    :data:`EXACT` columns Ω is the identity, and it is no estimate. Sketches of one module use the
    same Ω, so that they can be subtracted.
    """

    def __init__(self, like: Factors, index: int) -> None:
        k = like.a.shape[1]
        generator = torch.Generator().manual_seed(index)
        self._vectors = (
            torch.eye(k)
            if k <= EXACT
            else torch.randn(k, VECTORS, generator=generator) / VECTORS**0.5
        )
        self._sum = torch.zeros(like.b.shape[0], self._vectors.shape[1], dtype=torch.float64)

    def add(self, factors: Factors, weight: float) -> None:
        """Add ``weight · B·A``."""
        self._sum.add_(factors.b @ (factors.a @ self._vectors), alpha=weight)

    def energy(self) -> float:
        """‖M‖_F²."""
        return float(self._sum.square().sum())


class Sketches:
    """One :class:`Sketch` for each module of an adapter."""

    def __init__(self, like: Adapter) -> None:
        self._modules = {
            module: Sketch(own, index) for index, (module, own) in enumerate(like.factors.items())
        }

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add ``weight`` times the adapter's products, its scale included."""
        for module, own in adapter.factors.items():
            self._modules[module].add(own, weight * adapter.scale)

    def norm(self) -> float:
        """Of all modules together."""
        return math.sqrt(sum(sketch.energy() for sketch in self._modules.values()))


class Diagnosis:
    """Watches one round.

    Parameters
    ----------
    reference : Adapter
        The global adapter at its start.
    """

    def __init__(self, reference: Adapter) -> None:
        self._reference = reference
        whole = Sketches(reference)
        whole.add(reference, 1.0)
        self._norm = whole.norm()
        self._given: list[float] = []
        self._mean = Sketches(reference)
        self._change = Sketches(reference)
        self._weight = 0.0

    def truncation(self, share: Share, folds: bool) -> float:
        """How far a start is from the global adapter, relative to it (the folded part is exact)."""
        difference = Sketches(self._reference)
        difference.add(self._reference, 1.0)
        difference.add(share.given, -1.0)
        if share.frozen is not None and not folds:
            difference.add(share.frozen, -1.0)
        return difference.norm() / self._norm if self._norm else 0.0

    def start(self, truncation: float) -> None:
        """Note a client's start."""
        self._given.append(truncation)

    def see(self, update: Update) -> None:
        """Note an update that was merged."""
        self._weight += update.weight
        self._mean.add(update.trained, update.weight)
        self._change.add(update.trained, update.weight)
        self._change.add(update.given, -update.weight)

    def figures(
        self, merged: Adapter, residual: Adapter | None, after: Adapter
    ) -> dict[str, float]:
        """Figures of the round, from the merge, what it folded, and all that was learned by then.

        ``truncation-error``: mean over the clients of ‖ΔW − start‖/‖ΔW‖. ``mean-error``: distance
        of the merge (with what was folded) from M = Σ w·s·B·A, relative to M. ``change-error``: the
        same for the change, from ΔW + Σ w·s·(B·A − B⁰·A⁰), relative to the mean change. The norms
        are those of sketches, so beyond 64 columns all three are estimates.
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

    def _distance(self, target: Sketches, after: list[Adapter], before: list[Adapter]) -> float:
        """‖after − before − target‖ / ‖target‖; the target's sums are used up."""
        whole = target.norm()
        for adapters, sign in ((after, -1.0), (before, 1.0)):
            for adapter in adapters:
                target.add(adapter, sign * self._weight)
        return target.norm() / whole if whole else 0.0


def spectrum_figures(adapter: Adapter) -> dict[str, float]:
    """Energy of an adapter's spectrum, averaged over its modules; an untrained one is left out."""
    ranks, tops, norm = [], [], 0.0
    for own in adapter.factors.values():
        energies = _energies(own) * adapter.scale**2
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


def _energies(factors: Factors) -> Tensor:
    """Squared singular values of B·A, (rank,): the eigenvalues of √(BᵀB)·AAᵀ·√(BᵀB)."""
    b, a = factors.b.double(), factors.a.double()
    values, vectors = torch.linalg.eigh(b.T @ b)
    root = vectors * values.clamp(min=0).sqrt()
    energies: Tensor = torch.linalg.eigvalsh(root.T @ (a @ a.T) @ root)
    return energies.clamp(min=0)
