"""Sums of products Σ w·B·A, added term by term as updates arrive, and their strongest directions.

Terms are kept side by side as factors at first. Once their ranks add up to the width they are
multiplied out into one dense (d, k) matrix, and so is every further block of them: memory does not
grow with the number of terms.
"""

import torch
from torch import Tensor

from rankfit.adapters.lowrank import exact, strongest
from rankfit.adapters.operator import Dense, Operator, Spectrum, Stack
from rankfit.adapters.state import Factors, random_rows

#: Row norm of A at the start of training, in expectation: √(k · 1/(3k)).
START_ROW_NORM = 3**-0.5
#: A direction is dead when its singular value is below this share of the largest.
DEAD = 1e-9
#: Stacked rank at which terms join a dense sum: enough for a product to run at full speed.
BLOCK = 512
CPU = torch.device("cpu")


class ProductSum:
    """Σ w·B·A, added term by term; memory is bounded by a few dense (d, k) matrices.

    Parameters
    ----------
    d, k : int
        Shape of the products.
    device : torch.device
        Where terms are multiplied out and decomposed; they wait, and results come, on the CPU.
    """

    def __init__(self, d: int, k: int, device: torch.device = CPU) -> None:
        self._d, self._k, self._device = d, k, device
        self._terms: list[tuple[Factors, float]] = []
        self._stacked = 0
        self._dense: Tensor | None = None

    def add(self, factors: Factors, weight: float) -> None:
        """Add ``weight · B·A``; the factors are kept and must not be changed afterwards.

        Raises
        ------
        ValueError
            If the factors are not of this sum's (d, k): nothing is ever broadcast.
        """
        shape = (factors.b.shape[0], factors.a.shape[1])
        if shape != (self._d, self._k):
            raise ValueError(f"a product of shape {shape} cannot join a sum of {self._d, self._k}")
        self._terms.append((factors, weight))
        self._stacked += factors.rank
        width = min(self._d, self._k)
        if self._stacked >= (width if self._dense is None else min(BLOCK, width)):
            self._multiply_out()

    def dense(self) -> Tensor:
        """The sum as a (d, k) matrix in float64."""
        return self._operator().dense().cpu()

    def spectrum(self, rank: int) -> Spectrum:
        """Its ``rank`` strongest directions, exactly."""
        return exact(self._operator(), min(rank, self._d, self._k)).cpu()

    def strongest(
        self,
        rank: int,
        tolerance: float,
        generator: torch.Generator,
        start: Tensor | None = None,
    ) -> Spectrum:
        """Its ``rank`` strongest directions; see :func:`rankfit.adapters.lowrank.strongest`."""
        return strongest(self._operator(), rank, tolerance, generator, start).cpu()

    def _operator(self) -> Operator:
        if self._dense is not None:
            if self._terms:
                self._multiply_out()
            return Dense(self._dense)
        return self._stack()

    def _stack(self) -> Stack:
        if not self._terms:
            none = torch.zeros(0, dtype=torch.float64)
            return Stack(torch.zeros(self._d, 0), torch.zeros(0, self._k), none).to(self._device)
        weights = [torch.full((own.rank,), w, dtype=torch.float64) for own, w in self._terms]
        return Stack(
            torch.cat([own.b for own, _ in self._terms], 1),
            torch.cat([own.a for own, _ in self._terms], 0),
            torch.cat(weights),
        ).to(self._device)

    def _multiply_out(self) -> None:
        """Turn the terms that are kept as factors into part of the dense sum."""
        stack = self._stack()
        left = stack.left * stack.weights.to(stack.left.dtype)
        if self._dense is None:
            self._dense = left @ stack.right
        else:
            self._dense.addmm_(left, stack.right)
        self._terms, self._stacked = [], 0


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
