"""Terms of the local loss that pull on the factors alone: their gradients are added by hand.

Nothing of them enters the graph, so the memory of a training step stays what the estimator says.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfit.adapters import names

#: Trained parameters under PEFT's saved names.
Parameters = Mapping[str, nn.Parameter]


class Penalty(ABC):
    """A term of the loss."""

    @abstractmethod
    def add_gradients(self) -> None:
        """Add its gradient to that of the parameters that have one."""


class Proximal(Penalty):
    """FedProx (arXiv:1812.06127): μ/2·‖θ − θ⁰‖², with θ⁰ as the client was given it.

    Parameters
    ----------
    start : Mapping[str, Tensor]
        θ⁰, on the CPU: it takes no memory of the device between steps.
    """

    def __init__(self, parameters: Parameters, start: Mapping[str, Tensor], mu: float) -> None:
        self._pairs = [(parameter, start[name]) for name, parameter in parameters.items()]
        self._mu = mu

    @torch.no_grad()
    def add_gradients(self) -> None:
        """See the base class: μ·(θ − θ⁰)."""
        for parameter, start in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start.to(parameter.device), alpha=self._mu)


@dataclass(frozen=True)
class _Pair:
    """Both factors of one module, and the rank that pruning would keep."""

    b: nn.Parameter
    a: nn.Parameter
    keep: int

    def norms(self) -> tuple[Tensor, Tensor]:
        return self.b[:, self.keep :].norm(), self.a[self.keep :].norm()


class RankDecay(Penalty):
    """HetLoRA's self-pruning (arXiv:2401.06432): λ·Σ ‖B[:, k:]‖_F·‖A[k:, :]‖_F, k = pruned rank.

    When the sum has become smaller over the local training, the client prunes to k.

    Parameters
    ----------
    keep : int
        k; a module whose rank is not above it has no term.
    """

    def __init__(self, parameters: Parameters, keep: int, weight: float) -> None:
        modules = {names.parse(n)[0] for n in parameters if names.parse(n)[1] == "a"}
        pairs = [
            _Pair(parameters[names.b_name(m)], parameters[names.a_name(m)], keep)
            for m in sorted(modules)
        ]
        self._pairs = [pair for pair in pairs if pair.a.shape[0] > keep]
        #: Rank that pruning would keep.
        self.keep = keep
        self._weight = weight
        self._before = self.value()

    @torch.no_grad()
    def value(self) -> float:
        """The sum without its weight."""
        return sum(float(b * a) for b, a in (pair.norms() for pair in self._pairs))

    def prunes(self) -> bool:
        """Whether the directions to prune have lost weight since the start."""
        return self.value() < self._before

    @torch.no_grad()
    def add_gradients(self) -> None:
        """See the base class: ∂/∂B = λ·‖A‖·B/‖B‖ on the directions to prune, and vice versa."""
        for pair in self._pairs:
            b_norm, a_norm = pair.norms()
            for own, other, values, gradient in (
                (b_norm, a_norm, pair.b[:, pair.keep :], _part(pair.b, 1, pair.keep)),
                (a_norm, b_norm, pair.a[pair.keep :], _part(pair.a, 0, pair.keep)),
            ):
                if gradient is not None and float(own) > 0:
                    gradient.add_(values, alpha=float(self._weight * other / own))


def _part(parameter: nn.Parameter, axis: int, start: int) -> Tensor | None:
    """The gradient of the directions from ``start`` on, as a view."""
    if parameter.grad is None:
        return None
    return parameter.grad.narrow(axis, start, parameter.shape[axis] - start)


def pruned_rank(rank: int, decay: float) -> int:
    """Rank that self-pruning keeps: ⌊γ·r⌋, at least one less than r and never below 1."""
    return max(1, min(rank - 1, int(decay * rank)))


def cut_state(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Factors cut to their first ``rank`` directions; the head stays."""
    cuts = {"a": lambda t: t[:rank].clone(), "b": lambda t: t[:, :rank].clone()}
    return {
        name: cuts[part](tensor) if (part := names.parse(name)[1]) in cuts else tensor
        for name, tensor in state.items()
    }


def add_all(penalties: Iterable[Penalty]) -> None:
    """Add the gradients of all terms."""
    for penalty in penalties:
        penalty.add_gradients()
