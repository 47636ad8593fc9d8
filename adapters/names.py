"""PEFT's names for adapter tensors, in one place.

PEFT saves module ``m`` as ``base_model.model.m.lora_A.weight`` (r, k) and
``base_model.model.m.lora_B.weight`` (d, r), and a whole trained tensor ``t`` (a head) as
``base_model.model.t``. The names are the same for every rank; only shapes differ.

How fast the factors of an adapter and the head learn by Adam, beside the run's learning rate η.

Adam moves each number by about η in a step, whatever its gradient. A row of A of k numbers moves by
η·√k, whatever its length: with rows of norm 1 by half of it for k = 768 and η = .02. And B·A moves
by the steps of r columns: by √r times as much where they are independent. So one rate is another
speed at every width and every rank, and fits a head beside the adapter only at one of them. A
method can set both right (:class:`Rates`).

A head that is trained whole has another trouble. The gradient of the classes that a client does not
have is small, but not for Adam, whose first steps move each number by η whatever its gradient: each
round would take the head away from what the others taught it of those classes. With one second
moment for all numbers of a tensor a step is as long, and goes along the gradient.

That rank r wants 1/√r of the step is rsLoRA's argument (arXiv:2312.03732), there for the scale;
that A wants a lower rate than B the wider the model is, LoRA+'s (arXiv:2402.12354). Figures for
``rankfit`` are in benchmarks/notes/methods.md.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn


#: Which factors a client trains and returns in a round; the head always moves.
Trainable = Literal["both", "a", "b"]

_MOVING = {"both": ("a", "b", "head"), "a": ("a", "head"), "b": ("b", "head")}

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def a_name(module: str) -> str:
    """Name of the A factor of a module."""
    return f"{PREFIX}{module}{_A}"


def b_name(module: str) -> str:
    """Name of the B factor of a module."""
    return f"{PREFIX}{module}{_B}"


def head_name(tensor: str) -> str:
    """Name of a tensor that is trained whole."""
    return f"{PREFIX}{tensor}"


def parse(name: str) -> tuple[str, str]:
    """Split a saved name into its module or tensor and its part: ``a``, ``b`` or ``head``.

    Raises
    ------
    ValueError
        If the name is not one of PEFT's.
    """
    if not name.startswith(PREFIX):
        raise ValueError(f"adapter tensor {name!r} does not start with {PREFIX!r}")
    rest = name.removeprefix(PREFIX)
    if rest.endswith(_A):
        return rest.removesuffix(_A), "a"
    if rest.endswith(_B):
        return rest.removesuffix(_B), "b"
    if ".lora_" in rest:
        raise ValueError(f"adapter tensor {name!r} is neither lora_A, lora_B nor a head tensor")
    return rest, "head"


def moves_with(name: str, trainable: Trainable) -> bool:
    """Say whether a tensor is trained and returned when ``trainable`` is trained."""
    return parse(name)[1] in _MOVING[trainable]


#: Key of a group of parameters, each tensor of which has one second moment.
WHOLE = "whole"


@dataclass(frozen=True)
class Rates:
    """How A, B and the head learn; the default is Adam at the run's rate for all numbers.

    Free of torch, so that a plan can carry it.

    Attributes
    ----------
    rank_power : float
        Factors of rank r learn at r^−rank_power of the rate (0 = every rank at one).
    row_step : float
        Most that a step moves a row of A, in learning rates: A learns at min(1, row_step/√k) of B's
        rate (0 = at B's).
    whole_head : bool
        Each tensor of the head has one second moment, the mean over its numbers.
    """

    rank_power: float = 0.0
    row_step: float = 0.0
    whole_head: bool = False

    def b(self, rank: int) -> float:
        """Share of the run's rate for B (d, rank)."""
        return float(rank**-self.rank_power)

    def a(self, rank: int, inputs: int) -> float:
        """Share of the run's rate for A (rank, inputs)."""
        slower = min(1.0, self.row_step / math.sqrt(inputs)) if self.row_step else 1.0
        return slower * self.b(rank)

    def groups(
        self, trained: Iterable[tuple[str, "nn.Parameter"]], rate: float
    ) -> list[dict[str, Any]]:
        """Parameters by how they learn, for :func:`rankfit.tasks.optimizers.build_optimizer`.

        Parameters
        ----------
        trained : iterable of (str, nn.Parameter)
            Parameters of adapters and heads, by the names that they are saved by.
        rate : float
            Of the run.
        """
        alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in trained:
            part = parse(name)[1]
            share = 1.0
            if part == "a":
                share = self.a(*parameter.shape)
            elif part == "b":
                share = self.b(parameter.shape[1])
            whole = self.whole_head and part == "head"
            alike.setdefault((rate * share, whole), []).append(parameter)
        return [
            {"params": parameters, "lr": own} | ({WHOLE: True} if whole else {})
            for (own, whole), parameters in alike.items()
        ]
