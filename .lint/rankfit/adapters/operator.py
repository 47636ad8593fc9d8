"""A large matrix in the form in which it is at hand, and its decomposition."""

from dataclasses import dataclass

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
        return self.right.T @ ((self.left.T @ block) * self.weights.to(block.dtype)[:, None])

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
        return self.matrix.T @ block

    def dense(self) -> Tensor:
        """M in float64."""
        return self.matrix.double()


Operator = Stack | Dense
