"""Kronecker factors in place of low-rank ones (LoKr): ΔW = s·W₁ ⊗ (B·A).

The base is changed, and nothing else needs to know: an adapted layer is wrapped into one with two
small layers beside it. ``outer`` is W₁, trained whole like a head; ``inner`` has a weight of zero
and takes an ordinary LoRA adapter, B·A. Names, wire, plans and PEFT work as for any other model.

Source: LoKr (arXiv:2309.14859).
"""

from collections.abc import Iterable
from math import isqrt
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankfit.adapters.state import Adapter, Factors
from rankfit.tasks.sources import ModelError

INNER, OUTER, BASE = ".inner", ".outer", ".base"


class Kronecker(nn.Module):
    """A linear layer of shape (l·p, m·q), with W₁ (l, m) and a place for B·A (p, q).

    Parameters
    ----------
    base : nn.Linear
        The frozen layer.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        (rows, p), (columns, q) = halves(base.out_features), halves(base.in_features)
        self.base = base
        self._block = q
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.outer = nn.Linear(columns, rows, bias=False, **like)
        self.inner = nn.Linear(q, p, bias=False, **like)
        nn.init.zeros_(self.inner.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """W·x + (W₁ ⊗ B·A)·x; inputs (…, m·q)."""
        blocks = inputs.reshape(*inputs.shape[:-1], -1, self._block)  # (…, m, q)
        mixed = self.outer(self.inner(blocks).transpose(-1, -2))  # (…, p, l)
        added: Tensor = mixed.transpose(-1, -2).flatten(-2)  # (…, l·p)
        result: Tensor = self.base(inputs)
        return result + added.to(result.dtype)


def halves(width: int) -> tuple[int, int]:
    """The two whole factors of a width that are nearest to each other, the smaller first."""
    smaller = next(n for n in range(isqrt(width), 0, -1) if width % n == 0)
    return smaller, width // smaller


def wrap(model: PreTrainedModel, targets: Iterable[str]) -> None:
    """Wrap layers of a base model in place; W₁ is drawn from torch's global random state.

    Raises
    ------
    ModelError
        If one is no plain Linear layer.
    """
    for name in targets:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"lora.form kronecker: {name} is a {type(layer).__name__}; expected Linear layers"
            )
        model.set_submodule(name, Kronecker(layer))
    model.requires_grad_(False)


def unwrap(model: PreTrainedModel) -> PreTrainedModel:
    """Take the wrapping off, in place."""
    for name in wrapped(model):
        model.set_submodule(name, cast(Kronecker, model.get_submodule(name)).base)
    return model


def wrapped(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that are wrapped, in the model's order."""
    return tuple(n for n, module in model.named_modules() if isinstance(module, Kronecker))


def expanded(adapter: Adapter) -> Adapter:
    """The same change of the weights as an ordinary LoRA adapter of the unwrapped base.

    W₁ ⊗ (B·A) = (W₁ ⊗ B)·(1 ⊗ A), of rank m·r.
    """
    factors, head = {}, dict(adapter.head)
    for inner, own in adapter.factors.items():
        name = inner.removesuffix(INNER)
        outer = head.pop(f"{name}{OUTER}.weight")  # (l, m)
        b = torch.kron(outer, own.b)  # (l·p, m·r)
        a = torch.kron(torch.eye(outer.shape[1]), own.a)  # (m·r, m·q)
        factors[name] = Factors(b, a)
    return Adapter(factors, adapter.scale, head)
