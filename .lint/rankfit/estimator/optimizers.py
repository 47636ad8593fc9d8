"""Optimizers on meta tensors: torch's own where it runs there, else a stand-in for its memory.

A stand-in makes the state of its optimizer at the first step and nothing after that: fused kernels
and bitsandbytes' write in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfit.adapters.rates import WHOLE
from rankfit.estimator.spec import StepSpec
from rankfit.tasks.optimizers import build_optimizer

#: bitsandbytes keeps the state of smaller tensors in float32.
LEAST_8BIT = 4096
#: Numbers that share one float32 scale there.
BLOCK_8BIT = 256

State = dict[str, Tensor]


class StandIn(torch.optim.Optimizer):
    """Takes the memory of an optimizer.

    Parameters
    ----------
    trained : dict of str to nn.Parameter
        By their names in the model.
    make : callable
        From the name and a parameter to its state.
    """

    def __init__(
        self, trained: dict[str, nn.Parameter], make: Callable[[str, Tensor], State]
    ) -> None:
        super().__init__(list(trained.values()), {})
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._make = make

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make the state of the parameters that have a gradient and none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self.state:
                    name = self._names[id(parameter)]
                    self.state[parameter] = self._make(name, parameter)


def make_optimizer(spec: StepSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer as it runs there: foreach on a GPU, one tensor at a time on a CPU."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if next(iter(trained.values())).device.type == "meta":
        if spec.optimizer == "adamw-fused":
            return StandIn(trained, partial(_fused, spec.whole_head))
        if spec.optimizer == "adamw-8bit":
            return StandIn(trained, _EightBit())
    # One rate, where those of a method may be several: foreach's temporaries are of a group.
    heads = {name for name in trained if spec.whole_head and not _factor(name)}
    groups: list[dict[str, Any]] = [{"params": [p for n, p in trained.items() if n not in heads]}]
    if heads:
        groups.append({"params": [trained[name] for name in sorted(heads)], WHOLE: True})
    foreach = spec.accelerator == "cuda"
    return build_optimizer(
        spec.optimizer, groups, rate=1e-3, momentum=spec.momentum, foreach=foreach
    )


def _factor(name: str) -> bool:
    return ".lora_" in name


def _fused(whole_head: bool, name: str, parameter: Tensor) -> State:
    if whole_head and not _factor(name):
        return {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros((), device=parameter.device),
        }
    return {
        "step": torch.zeros((), device=parameter.device),  # on the device, unlike foreach's
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


class _EightBit:
    """State of AdamW in 8 bits: a byte a number, a scale for 256 of them, two shared code books.

    Both the scale of the last numbers and the switch to float32 below 4096 numbers are no multiples
    of the rank: the scales are rounded up for each unit of rank, and the float32 state of a small
    rank is held at every rank. That is at most 12 KiB for each state of a factor too much.
    """

    def __init__(self) -> None:
        self._books: State = {}

    def __call__(self, name: str, parameter: Tensor) -> State:
        if not self._books:
            books = {f"qmap{i}": torch.empty(256, device=parameter.device) for i in (1, 2)}
            self._books.update(books)
        rank = parameter.shape[0] if ".lora_A." in name else 1
        rank = parameter.shape[1] if ".lora_B." in name else rank
        width = parameter.numel() // rank
        if rank == 1 and width < LEAST_8BIT:
            return {f"state{i}": torch.zeros_like(parameter) for i in (1, 2)}
        state = dict(self._books)
        short = 3 * ((LEAST_8BIT - 1) // width) * width
        for i in (1, 2):
            state[f"state{i}"] = torch.zeros_like(parameter, dtype=torch.uint8)
            scales = rank * -(-width // BLOCK_8BIT)
            state[f"absmax{i}"] = torch.zeros(scales, device=parameter.device)
            if short:
                state[f"short{i}"] = torch.empty(short, dtype=torch.uint8, device=parameter.device)
        return state
