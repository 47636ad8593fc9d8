"""The kernels of the traced device, on meta tensors.

Meta tensors dispatch like CPU tensors without fused kernels. Two composite operators are redirected
at ``AutogradMeta`` to what the traced device runs, which touches meta tensors alone and, unlike a
``TorchFunctionMode``, also holds while gradient checkpointing recomputes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rankfit.estimator.report import Accelerator

aten = torch.ops.aten
#: The redirections are global to the process while they last.
_LOCK = threading.Lock()

#: Operators that make torch create a cuBLAS workspace at the first call of a thread.
MATMULS = frozenset({aten.addmm.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default})


@contextmanager
def kernels(accelerator: Accelerator) -> Iterator[None]:
    """Redirect dropout and attention on meta tensors to the kernels of a device."""
    with _LOCK, torch.library._scoped_library("aten", "IMPL") as library:
        if accelerator == "cuda":
            library.impl("dropout", _dropout_cuda, "AutogradMeta")
            library.impl("scaled_dot_product_attention", _attention_cuda, "AutogradMeta")
        else:
            library.impl("scaled_dot_product_attention", _attention_cpu, "AutogradMeta")
            library.impl("native_layer_norm", _layer_norm_cpu, "Meta")
        yield


def _layer_norm_cpu(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and reciprocal deviation in the input's type (on a GPU, and on meta, in float32)."""
    rows = x.shape[: x.dim() - len(shape)]
    mixed = weight is not None and weight.dtype != x.dtype
    moments = x.new_empty(
        [*rows, *(1 for _ in shape)], dtype=torch.float32 if mixed else x.dtype
    )  # (…, 1)
    return torch.empty_like(x), moments, torch.empty_like(moments)


def _dropout_cuda(x: Tensor, p: float, train: bool) -> Tensor:
    if train and 0 < p < 1 and x.numel() > 0:
        return torch.native_dropout(x, p, train)[0]
    return x if not train or p == 0 else torch.mul(x, torch.zeros((), device=x.device))


def _math(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = aten.scaled_dot_product_attention.default.decompose(q, k, v, *args, **kwargs)
    return result


def _attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash for half precision without a mask, memory-efficient otherwise (torch's order)."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        result = aten._scaled_dot_product_flash_attention.default(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )
    elif not enable_gqa and (attn_mask is None or not attn_mask.requires_grad):
        saves = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        bias = None if attn_mask is None else _bias(attn_mask, q, k)
        result = aten._scaled_dot_product_efficient_attention.default(
            q, k, v, bias, saves, dropout_p, is_causal, scale=scale
        )
    else:
        return _math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    out: Tensor = result[0]
    return out


def _bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Additive bias of the efficient kernel: float, rows padded to 8 numbers, expanded."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    short = -mask.shape[-1] % 8
    if short:
        mask = torch.nn.functional.pad(mask, (0, short))[..., : k.shape[-2]]
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash for CPU where torch takes it (no dropout), the composite otherwise."""
    if dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad):
        return _math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(
            attn_mask.logical_not(), float("-inf")
        )
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _flash_scratch(args: tuple[Any, ...]) -> int:
    """Accumulator of dq and row sums: B·H·⌈S⌉128·⌈D⌉32·4 + B·H·⌈S⌉128·4 bytes."""
    batch, heads, length, width = args[1].shape
    rows = int(batch * heads * _up(length, 128))
    return rows * _up(width, 32) * 4 + rows * 4


def _efficient_scratch(args: tuple[Any, ...]) -> int:
    """Row sums delta: B·H·S·4 bytes; in full precision also the product that is summed."""
    batch, heads, length, width = args[1].shape
    rows = int(batch * heads * length)
    return rows * 4 * (1 + width if args[1].dtype == torch.float32 else 1)


#: Bytes that a kernel takes and gives back inside one call (from the kernels' sources).
SCRATCH: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_scratch,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_scratch,
}
