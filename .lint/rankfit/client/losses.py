"""Losses of local training."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

#: (model, batch with labels) → mean loss over the batch.
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def plain(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss: cross entropy, of a regression the squared error."""
    loss: Tensor = model(**inputs).loss
    return loss


def prior_adjusted(labels: Tensor, classes: int, weight: float) -> Loss:
    """Cross entropy of logits + τ·log π, π the client's own label prior (arXiv:2007.07314).

    A client that holds few classes then does not push down the logits of all others. One sample
    is added to each class, so that a class it lacks keeps a finite prior.

    Parameters
    ----------
    labels : Tensor
        Labels of all the client's training samples, (n,) int64.
    weight : float
        τ.
    """
    counts = torch.bincount(labels, minlength=classes).float() + 1
    shift = weight * (counts / counts.sum()).log()  # (classes,)

    def loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        logits = model(**{n: t for n, t in inputs.items() if n != "labels"}).logits
        return cross_entropy(logits.float() + shift.to(logits.device), inputs["labels"])

    return loss
