"""The strongest directions of a large matrix, given as factors or whole, to a tolerance."""

import logging
from dataclasses import dataclass
from typing import TypeGuard

import scipy.linalg
import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Singular value decomposition of a product: U (d, n), values (n,), Vᵀ (n, k)."""

    u: Tensor
    values: Tensor
    vt: Tensor

    def transposed(self) -> "Spectrum":
        """The spectrum of the transposed matrix."""
        return Spectrum(self.vt.T, self.values, self.u.T)

    def cpu(self) -> "Spectrum":
        """The spectrum on the CPU."""
        return Spectrum(self.u.cpu(), self.values.cpu(), self.vt.cpu())

    def scaled(self, factor: float) -> "Spectrum":
        """The spectrum of ``factor`` (> 0) times the matrix."""
        return Spectrum(self.u, self.values * factor, self.vt)


@dataclass(frozen=True)
class Stack:
    """M = left · diag(weights) · right.

    Attributes
    ----------
    left, right : Tensor
        (d, n) and (n, k).
    weights : Tensor
        (n,), float64.
    """

    left: Tensor
    right: Tensor
    weights: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""
        return self.left.shape[0], self.right.shape[1]

    def to(self, device: torch.device) -> "Stack":
        """The same on a device."""
        return Stack(self.left.to(device), self.right.to(device), self.weights.to(device))

    @property
    def product_flops(self) -> float:
        """Multiplications of M with one column."""
        return float(self.left.numel() + self.right.numel())

    def times(self, block: Tensor) -> Tensor:
        """M · block, of shape (d, columns)."""
        return self.left @ ((self.right @ block) * self.weights.to(block.dtype)[:, None])

    def transposed_times(self, block: Tensor) -> Tensor:
        """Mᵀ · block, of shape (k, columns)."""
        # As rows times a matrix: MKL reads a transposed large factor 1.4 to 1.6 times slower.
        rows = (block.T.contiguous() @ self.left) * self.weights.to(block.dtype)
        return (rows @ self.right).T

    def dense(self) -> Tensor:
        """M in float64."""
        return (self.left.double() * self.weights) @ self.right.double()


@dataclass(frozen=True)
class Dense:
    """M as it is, (d, k)."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def product_flops(self) -> float:
        """Multiplications of M with one column."""
        return float(self.matrix.numel())

    def times(self, block: Tensor) -> Tensor:
        """M · block, of shape (d, columns)."""
        return self.matrix @ block

    def transposed_times(self, block: Tensor) -> Tensor:
        """Mᵀ · block, of shape (k, columns)."""
        return (block.T.contiguous() @ self.matrix).T  # see Stack

    def dense(self) -> Tensor:
        """M in float64."""
        return self.matrix.double()


Operator = Stack | Dense


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
