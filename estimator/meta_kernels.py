"""The kernels of the traced device on meta tensors, and autocast there."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from rankfit.estimator.device_report import Accelerator

Kernel = Literal["cudnn", "flash", "efficient", "math"]

aten = torch.ops.aten
#: The redirections are global to the process while they last.
_LOCK = threading.Lock()

#: Operators that make torch create a cuBLAS workspace at the first call of a thread.
MATMULS = frozenset({aten.addmm.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default})


@contextmanager
def kernels(accelerator: Accelerator, family: str = "") -> Iterator[None]:
    """Redirect dropout and attention on meta tensors to the kernels of a device.

    Parameters
    ----------
    family : str
        Of a GPU (:func:`kernel_family`).
    """
    with (
        _LOCK,
        torch.library._scoped_library("aten", "IMPL") as library,
        ExitStack() as stack,
    ):
        if accelerator == "cuda":
            library.impl("dropout", _dropout_cuda, "AutogradMeta")
            library.impl("softmax.int", _softmax_cuda, "AutogradMeta")
            library.impl("_grouped_mm", _grouped_product, "Meta")
            attention = partial(_attention_cuda, family)
            library.impl("scaled_dot_product_attention", attention, "AutogradMeta")
            stack.enter_context(_experts(family))
        else:
            library.impl("scaled_dot_product_attention", _attention_cpu, "AutogradMeta")
            library.impl("native_layer_norm", _layer_norm_cpu, "Meta")
            library.impl("_grouped_mm", _grouped_product, "Meta")
        yield


def _experts(family: str) -> AbstractContextManager[object]:
    """Let mixtures of experts take the products that they take on a GPU older than grouped ones."""
    if family != "7.5" or find_spec("transformers.integrations.moe") is None:
        return nullcontext()
    return patch("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)


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


def _softmax_cuda(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """A GPU reads fp16 as it writes float32; all other types are cast before."""
    if x.dtype == torch.float16 and dtype == torch.float32:
        return aten._softmax.default(x, dim, True)  # type: ignore[no-any-return]
    return aten._softmax.default(x if dtype is None else x.to(dtype), dim, False)  # type: ignore[no-any-return]


def _grouped_product(
    one: Tensor,
    two: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Product of each expert's rows with its matrix, which torch's own refuses beside bf16.

    Rows begin at multiples of 16 bytes.
    """
    shape: tuple[int, ...]
    if one.dim() == 2 and two.dim() == 2:
        assert offs is not None
        shape = (offs.shape[0], one.shape[0], two.shape[1])
    elif one.dim() == 2 or two.dim() == 2:
        shape = (one.shape[-2], two.shape[-1])
    else:
        shape = (one.shape[0], one.shape[1], two.shape[2])
    width = _up(shape[-1], 16 // one.element_size())
    rows = one.new_empty((*shape[:-1], width), dtype=out_dtype)
    return rows[..., : shape[-1]] if width != shape[-1] else rows


def _math(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = aten.scaled_dot_product_attention.default.decompose(q, k, v, *args, **kwargs)
    return result


def kernel_family(compute_capability: str, torch_version: str = "") -> str:
    """Least compute capability whose attention kernels are those of a GPU.

    Parameters
    ----------
    compute_capability : str
        "9.0"; "" = not known, taken for 8.0.
    torch_version : str
        Of the client; "" = that of this process.
    """
    if not compute_capability:
        return "8.0"
    major, minor = (int(part) for part in compute_capability.split("."))
    if major < 8:
        return "7.5"
    if (major, 6) <= (8, minor) or major == 12:
        return "8.6"
    # From torch 2.9 on cuDNN's attention comes first on Hopper and on data-centre Blackwell.
    found = re.match(r"(\d+)\.(\d+)", torch_version or torch.__version__)
    newer = found is None or (int(found[1]), int(found[2])) >= (2, 9)
    return f"{major}.0" if newer and major in (9, 10) else "8.0"


def attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    enable_gqa: bool,
    family: str,
) -> Kernel:
    """Kernel that torch takes on a GPU (``select_sdp_backend`` in its ``cuda/sdp_utils.cpp``).

    Parameters
    ----------
    q, k, v : Tensor
        (batch, heads, length, width); of k and v the heads may be fewer.
    mask : Tensor, optional
        Additive or boolean.
    family : str
        Of the GPU (:func:`kernel_family`).
    """
    if {q.dim(), k.dim(), v.dim()} != {4} or 0 in (q.shape[2], k.shape[2]):
        return "math"
    if len({q.shape[0], k.shape[0], v.shape[0]}) > 1:
        return "math"
    if mask is not None and mask.stride(-1) != 1:
        return "math"
    tensors, width = (q, k, v), q.shape[-1]
    trains = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    dense = all(each.stride(-1) == 1 for each in tensors)
    low = q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and family != "7.5")
    equal = q.shape[1] == k.shape[1] == v.shape[1]
    grouped = enable_gqa and k.shape[1] == v.shape[1] and q.shape[1] % k.shape[1] == 0
    heads = grouped if enable_gqa else equal
    fused = low and heads and (dense or width == 1) and family != "7.5"
    if fused and family in ("9.0", "10.0") and _cudnn(q, k, v, mask, dropout, family):
        return "cudnn"
    if fused and mask is None and width == k.shape[-1] == v.shape[-1] <= 256:
        backward = width <= 192 or (width > 224 and not dropout)
        square = not causal or q.shape[2] == k.shape[2]
        if square and (backward or not trains or family != "8.6"):
            return "flash"
    step = 16 // q.element_size() if family != "7.5" or q.element_size() == 2 else 1
    aligned = width == k.shape[-1] and not width % step and not v.shape[-1] % step
    if equal and dense and aligned and (low or q.dtype == torch.float32):
        return "efficient"
    return "math"


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, family: str
) -> bool:
    """Whether cuDNN's attention takes these shapes."""
    length, keys, width, out = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    most = 256 if family == "9.0" else 128
    if max(width, out) > most and (width, out) != (192, 128):
        return False
    if width % 8 or out % 8 or keys == 1 or (dropout and length == 1):
        return False
    if (dropout * 16) % 1:
        return False
    return mask is None or _fits(mask, q, k)


def _fits(mask: Tensor, q: Tensor, k: Tensor) -> bool:
    """Whether a mask without gradient is (length, keys) or (batch, heads, …), each whole or 1."""
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    shape = (*q.shape[:3], k.shape[2])[-mask.dim() :]
    return all(own in (1, whole) for own, whole in zip(mask.shape, shape, strict=True))


def _attention_cuda(
    family: str,
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
    """Attention by the kernel that torch takes."""
    kernel = attention_kernel(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, family)
    if kernel == "math":
        return _math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if kernel == "flash":
        width, short = q.shape[-1], -q.shape[-1] % 8
        if short:
            q, k, v = (torch.nn.functional.pad(each, (0, short)) for each in (q, k, v))
        result = aten._scaled_dot_product_flash_attention.default(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )
        out: Tensor = result[0][..., :width] if short else result[0]
        return out
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if kernel == "cudnn":
        bias = attn_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(bias.logical_not(), -1e4)
        result = aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, bias, saves, dropout_p, is_causal, False, scale=scale
        )
    else:
        bias = None if attn_mask is None else _bias(attn_mask, q, k)
        result = aten._scaled_dot_product_efficient_attention.default(
            q, k, v, bias, saves, dropout_p, is_causal, scale=scale
        )
    return result[0]  # type: ignore[no-any-return]


def _bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Additive bias of the efficient kernel: float, rows padded to 8 numbers, expanded."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    short = -mask.shape[-1] % 8
    if short:
        mask = torch.nn.functional.pad(mask, (0, short))[..., : k.shape[-2]]
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def cpu_attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, enable_gqa: bool
) -> Kernel:
    """Kernel that torch takes on a CPU (its ``sdp_utils_cpp.cpp``)."""
    tensors = (q, k, v)
    if dropout > 0 or {each.dim() for each in tensors} != {4}:
        return "math"
    same = len({(each.shape[0], each.shape[3]) for each in tensors}) == 1
    if not same or any(each.stride(-1) != 1 or not each.shape[2] for each in tensors):
        return "math"
    grouped = enable_gqa and k.shape[1] == v.shape[1] and q.shape[1] % k.shape[1] == 0
    if not grouped and not q.shape[1] == k.shape[1] == v.shape[1]:
        return "math"
    return "flash" if mask is None or _fits(mask, q, k) else "math"


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
    """Attention by the kernel that torch takes."""
    if cpu_attention_kernel(q, k, v, attn_mask, dropout_p, enable_gqa) == "math":
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


def _flash_scratch(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Row sums, accumulator of dq; with grouped heads dk and dv for every head of q."""
    batch, heads, length, width = args[1].shape
    rows = int(batch * heads * _up(length, 128))
    grouped = 0
    if args[2].shape[1] != heads:
        grouped = batch * heads * args[2].shape[2] * width * args[1].element_size()
    return rows * 4, rows * _up(width, 32) * 4, grouped, grouped


def _efficient_scratch(family: str, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Row sums and workspace; in float32 first the product that is summed."""
    batch, heads, length, width = args[1].shape
    keys, out, size = args[2].shape[2], args[3].shape[3], args[1].element_size()
    sums = int(batch * heads * length) * 4
    # Blocks of queries × keys of the kernels for such a width.
    large = family not in ("7.5", "8.6")
    rows, columns = (64, 64) if width <= 64 or family == "7.5" else (128, 64)
    if width > 96:
        rows, columns = (128, 128) if large else (64, 64)
    dq = -(-length // rows) * -(-width // columns) * (rows * columns * 4 + 16)
    dk = _up(keys, columns) * (_up(width, rows) + _up(out, rows)) * 4
    workspace = batch * heads * (dq + (dk if size == 2 and width > 128 else 0))
    product = sums * out if size == 4 else 0
    return sums, max(product + sums, workspace)


def _cudnn_scratch(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Workspace of cuDNN's backward pass: accumulator of dq, and row sums."""
    batch, heads, length, width = args[1].shape
    rows = int(batch * heads * length)
    return (rows * (width + 1) * 4,)


def _softmax_scratch(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The product of gradient and output."""
    return (args[0].nbytes,)


def scratch(func: Any, args: tuple[Any, ...], family: str) -> tuple[int, ...]:
    """Bytes that a GPU's kernel takes and gives back inside one call (from the kernels' sources).

    Each is a block of its own.
    """
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        return _efficient_scratch(family, args)
    return SCRATCH[func](args) if func in SCRATCH else ()


SCRATCH: dict[Any, Callable[[tuple[Any, ...]], tuple[int, ...]]] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_scratch,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_scratch,
    aten._softmax_backward_data.default: _softmax_scratch,
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
