"""Computes operators of a stub GPU on the CPU, in the device's own memory (which is host memory).

The genuine operator runs first: it allocates, checks its arguments and launches kernels into
nothing. Then the CPU's computes into the same memory. What is computed is one of

``"integers"``
    Operators on integers and booleans alone, and on single numbers: control flow is as on hardware,
    and a model of any size keeps its speed. A result that is not computed and is small or of
    integers is set to zero.
``"all"``
    Every operator, fused attention by its mathematics: losses are the CPU's.
"""

import ctypes
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: What the stub does itself (copies between host and device), or has no numbers to compute.
_GENUINE = (
    "aten._local_scalar_dense", "aten.empty", "aten.new_empty", "aten.resize_", "aten.set_",
    "aten.record_stream", "aten.is_pinned", "aten._pin_memory", "aten._fused_sdp_choice",
    "aten.detach", "aten.lift_fresh", "prim.device", "c10d.",  # collectives: by the stub of NCCL
)  # fmt: skip
#: Numbers of an uncomputed result that are set to zero.
_SMALL = 1 << 16


class Computing(TorchDispatchMode):
    """Computes in this thread while the block lasts; see the module.

    Attributes
    ----------
    skipped : dict of str to str
        Operators without a CPU form, and why.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self._all = what == "all"
        self.skipped: dict[str, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        name = str(func)
        made = str(kwargs.get("device") or "").startswith("cuda")
        if func.is_view or not (made or any(map(_on_gpu, inputs))) or name.startswith(_GENUINE):
            return func(*args, **kwargs)
        if not self._all and not all(map(_plain, inputs)):
            result = func(*args, **kwargs)
            if torch.Tag.dynamic_output_shape not in func.tags:
                _clear(func, result)
            return result
        if torch.Tag.dynamic_output_shape in func.tags and "index_put" not in name:
            host_args, host_kwargs = _hosted(args, kwargs)
            return tree_map(_sent, func(*host_args, **host_kwargs))
        result = func(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if not self._all and not all(map(_plain, outputs)):
            _clear(func, result)
            return result
        if inputs and outputs and not any(map(_on_gpu, outputs)):
            return result  # to the host: the stub has copied
        self._compute(func, args, kwargs, result)
        return result

    def _compute(self, func, args, kwargs, result) -> None:
        """Compute on the CPU, and write where the device's operator would have written."""
        host_args, host_kwargs = _hosted(args, kwargs)
        compute = _ATTENTION.get(func, func)
        try:
            computed = compute(*host_args, **host_kwargs)
        except (NotImplementedError, RuntimeError) as error:
            self.skipped[str(func)] = str(error).splitlines()[0][:120]
            _clear(func, result)
            return
        if result is None:  # in place on lists
            return
        returns = func._schema.returns
        pairs = [(result, computed)] if len(returns) == 1 else zip(result, computed, strict=True)
        for declared, (own, values) in zip(returns, pairs, strict=True):
            if declared.alias_info is None or not declared.alias_info.is_write:
                _write(own, values)


def _on_gpu(value) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _plain(tensor: Tensor) -> bool:
    """Whether the light form computes it: integers, booleans, single numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() <= 1


def _host(tensor):
    """A CPU tensor on the very memory of a GPU's."""
    if not _on_gpu(tensor):
        return tensor
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if not size:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(whole, tensor.storage_offset(), tensor.size(), tensor.stride())


def _hosted(args, kwargs):
    """Arguments as the CPU's operator takes them."""
    on_host = {
        key: torch.device("cpu")
        if key == "device" and value is not None
        else None
        if isinstance(value, torch.Generator)
        else tree_map(_host, value)
        for key, value in kwargs.items()
        if key not in ("pin_memory", "non_blocking")
    }
    return tree_map(_host, args), on_host


def _sent(value):
    """A computed result on the GPU."""
    return value.to("cuda") if isinstance(value, Tensor) else value


def _write(device, values) -> None:
    for own, value in zip(tree_flatten(device)[0], tree_flatten(values)[0], strict=True):
        if _on_gpu(own) and own.numel() and isinstance(value, Tensor):
            _host(own).copy_(value)


def _clear(func, result) -> None:
    """Zeros for new results that are small or of integers, not an earlier tensor's numbers."""
    declared = func._schema.returns
    if any(item.alias_info is not None for item in declared):
        return
    for tensor in tree_flatten(result)[0]:
        small = _on_gpu(tensor) and 0 < tensor.numel() <= _SMALL
        if small and (tensor.numel() <= 512 or tensor.dtype in (torch.int32, torch.int64)):
            _host(tensor).zero_()


def _weights(query, key, bias, dropout, causal, scale):
    """Attention weights (b, h, s, t), the keys of all query heads, and the scale."""
    if dropout:
        raise NotImplementedError("fused attention with dropout draws its mask inside the kernel")
    key = _per_head(key, query)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = query.float() @ key.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1), key, scale


def _per_head(shared, query):
    """Keys or values (b, k, t, d), k heads shared by the query's h, as (b, h, t, d) in float32."""
    return shared.float().repeat_interleave(query.size(1) // shared.size(1), 1)


def _attend(query, key, value, bias, dropout, causal, scale):
    weights, _, _ = _weights(query, key, bias, dropout, causal, scale)
    return (weights @ _per_head(value, query)).to(query.dtype)


def _attend_backward(grad, query, key, value, bias, dropout, causal, scale):
    """Gradients of query, key and value; those of shared heads are summed."""
    weights, keys, scale = _weights(query, key, bias, dropout, causal, scale)
    grad = grad.float()
    of_weights = grad @ _per_head(value, query).transpose(-2, -1)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_query = of_scores @ keys
    of_key = of_scores.transpose(-2, -1) @ query.float()
    of_value = weights.transpose(-2, -1) @ grad
    own = [
        per_head.unflatten(1, (shared.size(1), -1)).sum(2).to(shared.dtype)
        for per_head, shared in ((of_key, key), (of_value, value))
    ]
    return (of_query.to(query.dtype), *own)


def _flash(query, key, value, dropout=0.0, causal=False, return_mask=False, *, scale=None):
    return (_attend(query, key, value, None, dropout, causal, scale), *[None] * 8)


def _flash_backward(
    grad, query, key, value, out, sums, cq, ck, mq, mk, dropout, causal, seed, offset, *, scale=None
):
    return _attend_backward(grad, query, key, value, None, dropout, causal, scale)


def _efficient(query, key, value, bias, compute_sums, dropout=0.0, causal=False, *, scale=None):
    return (_attend(query, key, value, bias, dropout, causal, scale), *[None] * 3)


def _efficient_backward(
    grad, query, key, value, bias, out, sums, seed, offset, dropout, mask, causal=False,
    *, scale=None,
):  # fmt: skip
    return (*_attend_backward(grad, query, key, value, bias, dropout, causal, scale), None)


def _cudnn(
    query, key, value, bias, compute_sums, dropout=0.0, causal=False, return_mask=False,
    *, scale=None,
):  # fmt: skip
    return (_attend(query, key, value, bias, dropout, causal, scale), *[None] * 8)


def _cudnn_backward(
    grad, query, key, value, out, sums, seed, offset, bias, cq, ck, mq, mk, dropout,
    causal, *, scale=None,
):  # fmt: skip
    return _attend_backward(grad, query, key, value, bias, dropout, causal, scale)


_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default: _flash,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention.default: _efficient,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    _aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
}
