"""The optimizers of local training, by their names in ``train.optimizer``."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankfit.adapters.names import WHOLE
from rankfit.configs.learning import TORCH_ADAMW
from rankfit.configs.settings import ConfigError


class WholeAdamW(torch.optim.AdamW):
    """AdamW in which each tensor of the groups marked ``whole`` has one second moment.

    It is the mean over the tensor's numbers, 0-dimensional in the state: a step is as long as
    AdamW's, and goes along the gradient's running mean. Other groups are torch's AdamW.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # A fused AdamW would be called with gradients that are scaled, or not finite.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; gradients of the tensors marked ``whole`` are gone after it."""
        for group in self.param_groups:
            for parameter in group["params"] if group.get(WHOLE) else ():
                if parameter.grad is not None:
                    self._move(parameter, group)
                    parameter.grad = None  # torch's AdamW, which is next, leaves it alone
        super().step(closure)

    def _move(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        """In place, without a temporary of the tensor's size."""
        assert parameter.grad is not None
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros((), device=parameter.device)
        state["step"] += 1
        count = float(state["step"])
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].lerp_(norm.square() / parameter.numel(), 1 - second)
        size = (state["exp_avg_sq"] / (1 - second**count)).sqrt() + group["eps"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], size, value=-group["lr"] / (1 - first**count))


def build_optimizer(
    name: str,
    trained: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    *,
    rate: float,
    decay: float = 0.0,
    momentum: float = 0.0,
    foreach: bool | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer over the trained parameters.

    Parameters
    ----------
    trained : sequence
        Parameters, or groups of them with rates of their own, as torch's optimizers take them; with
        the key ``whole`` for :class:`WholeAdamW`, which the other optimizers do not look at.
    name : {"adamw", "adamw-fused", "adamw-8bit", "sgd", "adafactor"}
        ``adamw-8bit`` is bitsandbytes' (arXiv:2110.02861), ``adafactor`` arXiv:1804.04235.
    rate, decay : float
        Learning rate and weight decay.
    momentum : float
        Of ``sgd``.
    foreach : bool, optional
        All tensors in one kernel (default: torch's choice, which is so on a GPU).

    Raises
    ------
    ConfigError
        If the name is not known, or bitsandbytes is not installed.
    """
    if name in TORCH_ADAMW:
        whole = any(WHOLE in each for each in trained if isinstance(each, dict))
        kind = WholeAdamW if whole else torch.optim.AdamW
        if name == "adamw-fused":
            return kind(trained, lr=rate, weight_decay=decay, fused=True)
        return kind(trained, lr=rate, weight_decay=decay, foreach=foreach)
    if name == "sgd":
        return torch.optim.SGD(
            trained, lr=rate, weight_decay=decay, momentum=momentum, foreach=foreach
        )
    if name == "adafactor":
        return torch.optim.Adafactor(trained, lr=rate, weight_decay=decay)
    if name == "adamw-8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "train.optimizer adamw-8bit needs bitsandbytes: pip install 'rankfit[quantized]'"
            )
        from bitsandbytes.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(trained, lr=rate, weight_decay=decay)
        return eight_bit
    raise ConfigError(f"train.optimizer {name!r} is not known")
