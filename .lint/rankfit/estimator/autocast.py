"""Autocast on meta tensors, for which torch has none.

Kernels at a dispatch key that no build of torch uses do what torch's own do at the key of the
traced device: they cast the operands and go on below, where autograd and the trace see the casts.
``torch.autocast`` on the CPU is the switch, so gradient checkpointing takes it up again as it
recomputes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rankfit.estimator.report import Accelerator

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
