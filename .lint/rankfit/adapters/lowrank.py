"""The strongest directions of a large matrix that is given as factors, or whole.

Two routes to the best rank-R approximation of M (d, k):

- exact: a decomposition of the smallest matrix that holds M's spectrum. Cost grows with its cube;
- iterated: a block Krylov method in float32, from last round's directions where there are some (a
  warm start), until an estimate of what is still missed is below a tolerance. Cost is a few
  products of M with R + 16 columns.

:func:`strongest` takes the cheaper one by an estimate of both costs, and falls back from the second
to the first.
"""

import logging
from typing import TypeGuard

import torch
from torch import Tensor

from rankfit.adapters.krylov import OVERSAMPLING, PAIRS, iterated, leading
from rankfit.adapters.operator import Dense, Operator, Spectrum, Stack

log = logging.getLogger(__name__)

#: The exact route squares the matrix in float64: what is below this share of the largest singular
#: value is rounding, and is set to zero.
NOISE = 1e-7
#: Up to this size the exact route does not square: it costs milliseconds either way.
SMALL = 320
#: The cost model, in flops of a float32 product, measured on one core (only the size matters): one
#: flop in float64; the strongest eigenvectors of an (n, n) matrix, by n³; the small decompositions
#: with a product; and the products that usually suffice.
DOUBLE_FLOPS, EIGEN_FLOPS, STEP_FLOPS, USUAL_PRODUCTS = 2.0, 8.5, 0.6e9, 6


def strongest(
    matrix: Operator,
    rank: int,
    tolerance: float,
    generator: torch.Generator,
    start: Tensor | None = None,
) -> Spectrum:
    """The ``rank`` strongest directions.

    Parameters
    ----------
    matrix : Operator
        M (d, k), float32 or float64.
    rank : int
        At most min(d, k) directions are returned.
    tolerance : float
        By how much the total error ‖M − M̂‖ may exceed the best possible at this rank, relative to
        it, as estimated; 0 = the exact route.
    generator : torch.Generator
        For the block of the iterated route; on the CPU.
    start : Tensor, optional
        (n, k), rows that should be near the right singular vectors.
    """
    if tolerance > 0 and _narrow(matrix):
        return _by_qr(matrix, rank, torch.float32)
    if tolerance > 0 and _iterated_cost(matrix, rank) < _exact_cost(matrix):
        found = iterated(matrix, rank, tolerance, generator, start)
        if found is not None:
            return found
        log.info(
            "a merge of shape %s did not settle within %d pairs of products: decomposed exactly",
            matrix.shape, PAIRS,
        )  # fmt: skip
    return exact(matrix, rank)


def _iterated_cost(matrix: Operator, rank: int) -> float:
    """Expected flops, in float32 products, of the products that are usually needed."""
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    basis = DOUBLE_FLOPS * 8 * columns * columns * max(matrix.shape)
    return USUAL_PRODUCTS * (2 * columns * matrix.product_flops + basis + STEP_FLOPS)


def _exact_cost(matrix: Operator) -> float:
    """Expected flops, in float32 products."""
    n, outer = min(matrix.shape), max(matrix.shape)
    if isinstance(matrix, Stack) and matrix.left.shape[1] < n:
        n = matrix.left.shape[1]
        squares = 2 * n * n * sum(matrix.shape) + 5 * n**3
    else:
        squares = 2 * n * n * outer
    return DOUBLE_FLOPS * squares + EIGEN_FLOPS * n**3


def exact(matrix: Operator, rank: int) -> Spectrum:
    """The ``rank`` strongest directions by decompositions in float64."""
    if _narrow(matrix):
        return _by_qr(matrix, rank)
    size = min(matrix.shape)
    if isinstance(matrix, Stack) and matrix.left.shape[1] < size:
        return _by_grams(matrix, rank)
    if size <= SMALL:
        u, values, vt = torch.linalg.svd(matrix.dense(), full_matrices=False)
        return Spectrum(u[:, :rank], values[:rank], vt[:rank])
    return _by_square(matrix.dense(), rank)


def _narrow(matrix: Operator) -> TypeGuard[Stack]:
    return isinstance(matrix, Stack) and matrix.left.shape[1] <= min(SMALL, *matrix.shape)


def _by_qr(stack: Stack, rank: int, kind: torch.dtype = torch.float64) -> Spectrum:
    """Two QR factorisations reduce M to a core of the stacked rank (Chan, 1982)."""
    q_left, r_left = torch.linalg.qr(stack.left.to(kind) * stack.weights.to(kind))
    q_right, r_right = torch.linalg.qr(stack.right.to(kind).T)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T)
    return Spectrum(q_left @ u[:, :rank], values[:rank], vt[:rank] @ q_right.T)


def _by_grams(stack: Stack, rank: int) -> Spectrum:
    """From the (n, n) products of the two sides with themselves; M itself is never formed.

    With LᵀL = C·Cᵀ, the symmetric Cᵀ·(R·Rᵀ)·C has M's squared singular values, and its eigenvector
    y gives v = Rᵀ·C·y/σ.
    """
    left, right = stack.left.double() * stack.weights, stack.right.double()
    gram_left, gram_right = left.T @ left, right @ right.T
    shift = gram_left.diagonal().sum() * 1e-14  # the sides may be rank-deficient
    gram_left.diagonal().add_(shift)
    chol, failed = torch.linalg.cholesky_ex(gram_left)
    if int(failed):
        return _by_qr(stack, rank)
    y = leading(chol.T @ gram_right @ chol, rank)
    return _from_right(right.T @ (chol @ y), stack)


def _by_square(matrix: Tensor, rank: int) -> Spectrum:
    """From the eigenvectors of M·Mᵀ or MᵀM, whichever is smaller."""
    if matrix.shape[0] < matrix.shape[1]:
        return _by_square(matrix.T, rank).transposed()
    return _from_right(leading(matrix.T @ matrix, rank), Dense(matrix))


def _from_right(right: Tensor, matrix: Operator) -> Spectrum:
    """Decomposition of M on the span of (nearly orthogonal) right vectors (k, r).

    The vectors are made orthonormal and the small M·V is decomposed for itself, so the singular
    values are those of M and not roots of squared ones.
    """
    basis, _ = torch.linalg.qr(right)
    double = matrix if isinstance(matrix, Dense) else _in_double(matrix)
    u, values, vt = torch.linalg.svd(double.times(basis), full_matrices=False)
    live = values > NOISE * values[:1].clamp(min=torch.finfo(values.dtype).tiny)
    return Spectrum(u, torch.where(live, values, 0.0), vt @ basis.T)


def _in_double(stack: Stack) -> Stack:
    return Stack(stack.left.double(), stack.right.double(), stack.weights)
