"""Sums of products Σ w·B·A in factored form, and their best approximation at a lower rank.

All arithmetic is in float64: the factors are small, and an exact merge is what others are checked
against. The dense matrix (d, k) is built only when the stacked rank reaches the width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfit.adapters.state import Factors, random_rows

#: Row norm of A at the start of training, in expectation: √(k · 1/(3k)).
START_ROW_NORM = 3**-0.5
#: A direction is dead when its singular value is below this share of the largest.
DEAD = 1e-9


@dataclass(frozen=True)
class Spectrum:
    """Singular value decomposition of a product: U (d, n), values (n,), Vᵀ (n, k)."""

    u: Tensor
    values: Tensor
    vt: Tensor


class ProductSum:
    """Σ w·B·A, added term by term; memory is bounded by one dense (d, k) matrix."""

    def __init__(self, d: int, k: int) -> None:
        self._d, self._k = d, k
        self._left: list[Tensor] = []  # (d, r) each, weight folded in
        self._right: list[Tensor] = []  # (r, k) each
        self._stacked = 0
        self._dense: Tensor | None = None

    def add(self, factors: Factors, weight: float) -> None:
        """Add ``weight · B·A``.

        Raises
        ------
        ValueError
            If the factors are not of this sum's (d, k): nothing is ever broadcast.
        """
        shape = (factors.b.shape[0], factors.a.shape[1])
        if shape != (self._d, self._k):
            raise ValueError(f"a product of shape {shape} cannot join a sum of {self._d, self._k}")
        left, right = factors.b.double() * weight, factors.a.double()
        if self._dense is not None:
            self._dense.addmm_(left, right)
            return
        self._left.append(left)
        self._right.append(right)
        self._stacked += factors.rank
        if self._stacked >= min(self._d, self._k):
            self._dense = torch.cat(self._left, 1) @ torch.cat(self._right, 0)
            self._left, self._right = [], []

    def dense(self) -> Tensor:
        """The sum as a (d, k) matrix in float64."""
        if self._dense is not None:
            return self._dense
        if not self._left:
            return torch.zeros(self._d, self._k, dtype=torch.float64)
        return torch.cat(self._left, 1) @ torch.cat(self._right, 0)

    def spectrum(self) -> Spectrum:
        """Exact decomposition of the sum.

        Two QR factorisations reduce it to a core of the stacked rank (Chan, 1982); a sum that has
        reached the width is decomposed as it is.
        """
        if self._dense is not None or not self._left:
            u, values, vt = torch.linalg.svd(self.dense(), full_matrices=False)
            return Spectrum(u, values, vt)
        q_left, r_left = torch.linalg.qr(torch.cat(self._left, 1))
        q_right, r_right = torch.linalg.qr(torch.cat(self._right, 0).T)
        u, values, vt = torch.linalg.svd(r_left @ r_right.T)
        return Spectrum(q_left @ u, values, vt @ q_right.T)


def refactor(spectrum: Spectrum, rank: int, generator: torch.Generator) -> Factors:
    """Best rank-``rank`` approximation as trainable factors, strongest direction first.

    With n = max(√σ, norm of a fresh row), A's row is n·v and B's column σ/n·u. A strong direction
    is balanced, a weak one keeps an A that gradients can pass, and a dead one (σ = 0) gets a fresh
    random A and B = 0: the product is untouched and the direction stays trainable. The plain
    balanced form makes both factors zero there, which has zero gradient for ever.

    Returns
    -------
    Factors
        B (d, rank) and A (rank, k) in float32.
    """
    k = spectrum.vt.shape[1]
    values = spectrum.values[:rank]
    live = int((values > DEAD * spectrum.values[:1].clamp(min=1e-30)).sum())
    values = values[:live]
    norms = values.sqrt().clamp(min=START_ROW_NORM)
    b = spectrum.u[:, :live] * (values / norms)  # (d, live)
    a = spectrum.vt[:live] * norms[:, None]  # (live, k)
    fresh = random_rows(rank - live, k, generator)
    dead = torch.zeros(b.shape[0], rank - live)
    return Factors(torch.cat([b.float(), dead], 1), torch.cat([a.float(), fresh], 0))
