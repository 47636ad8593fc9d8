"""The kernels of the traced device on meta tensors, and autocast there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rankfit.estimator.device_report import Accelerator

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


#: Operators that run in the lower precision, on every device.
LOWER = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "conv1d", "conv2d", "conv3d",
    "conv1d.padding", "conv2d.padding", "conv3d.padding", "scaled_dot_product_attention", "prelu",
)  # fmt: skip
#: Operators that run in float32 (``aten/src/ATen/autocast_mode.h``).
FLOAT32: dict[Accelerator, tuple[str, ...]] = {
    "cpu": ("nll_loss", "nll_loss2d", "cross_entropy_loss", "mse_loss", "prod", "prod.dim_int"),
    "cuda": (
        "layer_norm", "native_layer_norm", "group_norm", "rms_norm", "nll_loss", "nll_loss2d",
        "mse_loss", "exp", "log", "rsqrt", "reciprocal", "softplus", "pow.Tensor_Scalar",
        "pow.Tensor_Tensor", "pow.Scalar",
    ),
}  # fmt: skip
#: Operators that are asked for a float32 result, whatever they take.
FLOAT32_RESULT: dict[Accelerator, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("softmax.int", "log_softmax.int", "cumsum", "cumprod", "prod", "sum",
             "sum.dim_IntList"),
}  # fmt: skip
#: Operators that run in the widest type among their operands.
WIDEST: dict[Accelerator, tuple[str, ...]] = {
    "cpu": ("cat", "stack", "index_copy"),
    "cuda": ("addcmul", "addcdiv", "bilinear", "cross", "index_put", "scatter_add", "tensordot"),
}

_NAME = "AutocastIPU"
_KEY = getattr(torch._C.DispatchKey, _NAME)
Operator = Callable[..., Any]
Cast = Callable[[Any], Any]


@contextmanager
def autocast_on_meta(accelerator: Accelerator) -> Iterator[None]:
    """Make ``torch.autocast("cpu", …)`` hold for meta tensors, as it does on a device."""
    cache: dict[int, tuple[Tensor, Tensor]] = {}
    clear, own = torch.clear_autocast_cache, threading.get_ident()

    def cleared() -> None:
        if threading.get_ident() == own:  # another thread may train meanwhile
            cache.clear()
        clear()

    with (
        torch.library._scoped_library("_", "IMPL") as everything,
        torch.library._scoped_library("aten", "IMPL") as library,
        patch.object(torch, "clear_autocast_cache", cleared),
    ):
        everything.fallback(torch.library.fallthrough_kernel, _NAME)
        for names, policy in (
            (LOWER, _lower(cache)),
            (FLOAT32[accelerator], _float32),
            (FLOAT32_RESULT[accelerator], _float32_result),
            (WIDEST[accelerator], _widest),
        ):
            for name in names:
                library.impl(name, _kernel(_operator(name), policy), _NAME)
        with _enabled():
            yield


def _operator(name: str) -> Operator:
    packet, _, overload = name.partition(".")
    operator: Operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return operator


@contextmanager
def _enabled(on: bool = True) -> Iterator[None]:
    """Let dispatch in this thread reach the kernels, or pass them by."""
    torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, not on)
    torch._C._dispatch_tls_set_dispatch_key_included(_KEY, on)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, on)
        torch._C._dispatch_tls_set_dispatch_key_included(_KEY, not on)


def _kernel(
    operator: Operator, policy: Callable[[tuple[Any, ...], dict[str, Any]], None | tuple[Any, Any]]
) -> Operator:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _enabled(False):
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = policy(args, kwargs) or (args, kwargs)
            return operator(*args, **kwargs)

    return kernel


def _eligible(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "meta"
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _mapped(cast: Cast, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def each(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(each(item) for item in value)
        return cast(value) if _eligible(value) else value

    return tuple(each(a) for a in args), {name: each(value) for name, value in kwargs.items()}


def _lower(cache: dict[int, tuple[Tensor, Tensor]]) -> Operator:
    """Cast to the lower type; trained parameters once until autocast ends."""

    def cast(value: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if not (value.dtype == torch.float32 and value.requires_grad and value.is_leaf):
            return value.to(dtype)
        if id(value) not in cache:
            cache[id(value)] = (value, value.to(dtype))
        return cache[id(value)][1]

    return lambda args, kwargs: _mapped(cast, args, kwargs)


def _float32(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _mapped(lambda value: value.float(), args, kwargs)


def _float32_result(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if not _eligible(args[0]) or kwargs.get("dtype") is not None:
        return None
    # The type is keyword-only in some of them, and the third in the others.
    if len(args) == 3 and (args[2] is None or isinstance(args[2], torch.dtype)):
        return ((*args[:2], args[2] or torch.float32), kwargs)
    return args, kwargs | {"dtype": torch.float32}


def _widest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    found: list[torch.dtype] = []
    _mapped(lambda value: found.append(value.dtype), args, kwargs)
    return _float32(args, kwargs) if torch.float32 in found else (args, kwargs)
