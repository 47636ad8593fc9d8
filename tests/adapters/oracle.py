"""What merges are checked against, written out densely."""

import torch
from torch import Tensor


def best(matrix: Tensor, rank: int) -> Tensor:
    """Best approximation of a matrix at a rank, by a plain SVD in float64."""
    u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vt[:rank]
