"""AdamW's second moments, kept on the client from one of its rounds to the next.

A new AdamW moves every number by its whole learning rate in the first step, whatever the size of
the gradient: in a round of few steps most of what moves is noise. With the second moments and the
count of steps kept, and the first moments new, a round begins gently, and a higher rate pays
(figures: benchmarks/notes/methods.md). Directions are re-factorised between rounds, so that what is
kept belongs to their places in the order of strength, not to the directions themselves.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfit.adapters.rates import WHOLE

#: Keys of a parameter's state in torch's AdamW.
_STEP, _FIRST, _SECOND = "step", "exp_avg", "exp_avg_sq"
#: Before the names of the counts of steps, among the kept tensors.
_STEPS = "steps/"


def recall(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
) -> None:
    """Let an AdamW that has not stepped yet go on from kept second moments.

    A parameter whose shape has changed, because its plan's rank did, begins anew.

    Parameters
    ----------
    parameters : Mapping[str, nn.Parameter]
        By the names that they are saved by.
    kept : Mapping[str, Tensor]
        What :func:`kept_moments` gave; empty in the first round. On the CPU its second moments are
        taken over, not copied: the estimate has no place for a second set.
    """
    groups = optimizer.param_groups
    whole = {id(each) for group in groups if group.get(WHOLE) for each in group["params"]}
    for name, parameter in parameters.items():
        second = kept.get(name)
        expected = torch.Size() if id(parameter) in whole else parameter.shape
        if second is None or second.shape != expected:
            continue
        # A fused kernel reads the count on the parameter's device, the others on the CPU.
        fused = bool(optimizer.defaults.get("fused"))
        place = parameter.device if fused else torch.device("cpu")
        optimizer.state[parameter] = {
            _STEP: kept[_STEPS + name].to(place, copy=True),
            _FIRST: torch.zeros_like(parameter),
            _SECOND: second.to(parameter),
        }


def kept_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Second moments and counts of steps of the parameters that have moved."""
    kept = {}
    for name, parameter in parameters.items():
        if state := optimizer.state.get(parameter):
            kept[name], kept[_STEPS + name] = state[_SECOND], state[_STEP]
    return kept
