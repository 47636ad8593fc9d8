"""The strongest directions of a matrix by a few products with blocks, to a tolerance."""

import scipy.linalg
import torch
from torch import Tensor

from rankfit.adapters.operator import Operator, Spectrum, Stack

#: Columns of a block beyond the rank.
OVERSAMPLING = 16
#: Random vectors that estimate how much of the matrix lies outside the blocks.
PROBES = 8
#: Pairs of products, with M and with its transpose, before the exact route is taken instead.
PAIRS = 8
#: A product of more flops than this is worth a look after each of them, not of each pair.
LOOK_FLOPS = 2e9
#: Share of the allowed excess that the estimate may fill; both rest on few figures.
SAFETY = 0.75
#: Energies closer than this share of the whole cannot be told apart in float32.
RESOLUTION = 1e-9


def iterated(
    matrix: Operator,
    rank: int,
    tolerance: float,
    generator: torch.Generator,
    start: Tensor | None = None,
) -> Spectrum | None:
    """Block Lanczos bidiagonalisation until the estimated excess error is below the tolerance.

    None if it is not within :data:`PAIRS` pairs of products. Each product is of a new orthonormal
    block with Mᵀ or M; all blocks are kept, so that the energy which their ``rank`` strongest
    directions capture grows as fast as with any method of as many products (Musco and Musco, 2015).
    The gains of the pairs tell what is still missed; random vectors that the blocks have not seen
    tell what lies outside.
    """
    d, k = matrix.shape
    columns = min(rank + OVERSAMPLING, d, k)
    like = matrix.left if isinstance(matrix, Stack) else matrix.matrix
    block = torch.randn(k, columns, generator=generator).to(like)
    if start is not None:
        known = start[:columns].to(like).T
        block[:, : known.shape[1]] = torch.where(
            known.abs().amax(0) > 0, known, block[:, : known.shape[1]]
        )
    fresh = torch.randn(k, PROBES, generator=generator).to(like)
    right = orthonormal(block)  # (k, n): grows by a block at a time, as does left (d, n)
    both = matrix.times(torch.cat([right, fresh], 1))
    products, probes = both[:, :columns], both[:, columns:]  # M · right, and what random rows see
    left, turned = products.new_zeros(d, 0), products.new_zeros(k, 0)  # and Mᵀ · left
    captured, gains = _captured(products, rank), list[float]()
    looks_often = 2 * columns * matrix.product_flops > LOOK_FLOPS
    while right.shape[1] + columns <= min(d, k) and len(gains) < 2 * PAIRS:
        block = orthonormal(products[:, right.shape[1] - columns :], left)
        left = torch.cat([left, block], 1)
        turned = torch.cat([turned, matrix.transposed_times(block)], 1)
        outside = float((probes - left @ (left.T @ probes)).double().square().sum()) / PROBES
        whole = float(turned.double().square().sum()) + outside
        gains.append(_captured(turned, rank) - captured if looks_often else 0.0)
        captured += gains[-1]
        if looks_often and _settled(gains, captured, whole, tolerance):
            return _assembled(turned, left, rank).transposed()
        block = orthonormal(turned[:, left.shape[1] - columns :], right)
        right = torch.cat([right, block], 1)
        products = torch.cat([products, matrix.times(block)], 1)
        gains.append(_captured(products, rank) - captured)
        captured += gains[-1]
        if _settled(gains, captured, whole, tolerance):
            return _assembled(products, right, rank)
    return None


def _settled(gains: list[float], captured: float, whole: float, tolerance: float) -> bool:
    """Whether the energy still missed is below (1 + tolerance)² − 1 of the best error's square.

    It is taken as what comes if the gains go on shrinking as they did. Two products are counted as
    one, for with d ≠ k one side's gain more than the other's, and rounding sets the two sides apart
    by a constant; until there are two pairs they are taken to halve.
    """
    pair, before = max(sum(gains[-2:]), 0.0), sum(gains[-4:-2])
    ratio = min(max(pair / before, 0.1), 0.9) if len(gains) >= 4 and before > 0 else 0.5
    missed = pair * ratio / (1 - ratio)
    allowed = SAFETY * ((1 + tolerance) ** 2 - 1) * max(whole - captured, 0.0)
    return missed <= max(allowed, RESOLUTION * whole)


def _captured(products: Tensor, rank: int) -> float:
    """Energy (squared singular values) of the strongest directions of a tall matrix."""
    double = products.double()
    return float(torch.linalg.eigvalsh(double.T @ double)[-rank:].clamp(min=0).sum())


def leading(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the ``rank`` largest eigenvalues, (n, rank), largest first."""
    if symmetric.is_cuda:
        largest: Tensor = torch.linalg.eigh(symmetric)[1][:, -rank:]
        return largest.flip(1)
    # LAPACK's subset driver is several times faster than all of torch.linalg.eigh.
    n = len(symmetric)
    _, vectors = scipy.linalg.eigh(
        symmetric.numpy(), subset_by_index=[max(n - rank, 0), n - 1], check_finite=False
    )
    ascending: Tensor = torch.from_numpy(vectors)
    return ascending.flip(1)


def orthonormal(tall: Tensor, against: Tensor | None = None) -> Tensor:
    """An orthonormal basis of the columns of a tall matrix, of the same shape.

    Twice by the eigenvectors of its Gram matrix, which is several times faster than Householder QR
    for many rows. Columns may differ in size by any factor; those that are no direction of their
    own leave columns of zeros.

    Parameters
    ----------
    tall : Tensor
        (n, columns).
    against : Tensor, optional
        (n, any), orthonormal: the basis is orthogonal to it.
    """
    for _ in range(2):
        largest = tall.abs().amax(0)
        tall = tall / torch.where(largest > 0, largest, 1.0)
        if against is not None and against.shape[1]:
            tall = tall - against @ (against.T @ tall)
        double = tall.double()
        values, vectors = torch.linalg.eigh(double.T @ double)
        live = values > 1e-12 * values[-1:].clamp(min=torch.finfo(values.dtype).tiny)
        scale = torch.where(live, values.clamp(min=1e-300).rsqrt(), 0.0)
        tall = tall @ (vectors * scale).to(tall.dtype)
    return tall


def _assembled(products: Tensor, right: Tensor, rank: int) -> Spectrum:
    """The decomposition of products · rightᵀ on the strongest directions of the products.

    Those come from a squared matrix; the singular values do not.
    """
    products = products.double()
    vectors = leading(products.T @ products, rank)
    u, values, vt = torch.linalg.svd(products @ vectors, full_matrices=False)
    return Spectrum(u, values, vt @ (right.double() @ vectors).T)
