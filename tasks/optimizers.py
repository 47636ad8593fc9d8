"""The optimizers of local training, by their names in ``train.optimizer``."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankfit.configs.settings import ConfigError


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
        Parameters, or groups of them with rates of their own, as torch's optimizers take them.
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
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=decay, foreach=foreach)
    if name == "adamw-fused":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=decay, fused=True)
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
