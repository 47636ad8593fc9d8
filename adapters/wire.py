"""Encoding of tensors for the wire: names and NumPy arrays, in the type that the run sets.

A tag on the name says how an array is to be read. NumPy has no bfloat16 and Flower refuses it, so
it travels as the same 16 bits in int16. With int8 a factor has one scale for each direction (row of
A, column of B), largest value = 127; the head beside it travels in bfloat16. Every float tensor is
decoded to float32.

With a type of few digits a client returns not its factors but their change, which is small: its
rounding is then small too. int8 rounds a change up or down at random, so that the expected value is
exact and errors cancel over clients and rounds. (Error feedback would carry each client's rounding
error to its next update; but directions are re-factorised between rounds, so that an error kept in
the old ones means nothing in the new.)
"""

import math
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankfit.adapters import names
from rankfit.configs.faults import Faulty

WireType = Literal["float32", "float16", "bfloat16", "int8"]
Arrays = dict[str, NDArray[np.generic]]
#: Number type of an array, by numpy's name, and its shape.
Layout = tuple[str, tuple[int, ...]]

_BFLOAT16_TAG, _INT8_TAG, _SCALE_TAG = "|bfloat16", "|int8", "|int8-scale"
_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_READ_AS = {_BFLOAT16_TAG: ("int16",), _INT8_TAG: ("int8",), _SCALE_TAG: ("float32",)}
_LARGEST = 127
#: Bytes of one value of a factor, and of a head, on the wire.
WIRE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
HEAD_BYTES: dict[str, int] = WIRE_BYTES | {"int8": 2}
#: Bytes that go with each direction of a factor.
SCALE_BYTES: dict[str, int] = dict.fromkeys(WIRE_BYTES, 0) | {"int8": 4}
#: Types in which a client returns what changed.
_CHANGES = ("bfloat16", "int8")


#: The start of a .npy file as numpy writes it: magic, version 1.0, and a header of fixed form.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<>|=]?\w{1,8})', 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,18},|\d{1,18}(?:, \d{1,18})+|)\), \} *\n",
    re.DOTALL,
)


class WireError(Faulty, ValueError):
    """Arrays that cannot be decoded."""

    code = "message-bad"


def encode(
    state: Mapping[str, Tensor], wire_type: WireType, generator: torch.Generator | None = None
) -> Arrays:
    """Turn tensors of any device into arrays of the wire type.

    Parameters
    ----------
    state : Mapping[str, Tensor]
        By PEFT's names.
    wire_type : WireType
        What the run sets.
    generator : torch.Generator, optional
        int8 rounds up or down at random, by the distance; without one, to the nearest.
    """
    arrays: Arrays = {}
    for name, tensor in state.items():
        plain = tensor.detach().cpu()
        if wire_type == "int8" and names.parse(name)[1] != "head":
            values, scales = _to_int8(plain.float(), _axis(name), generator)
            arrays[name + _INT8_TAG], arrays[name + _SCALE_TAG] = values.numpy(), scales.numpy()
            continue
        cast = plain.to(_TYPES.get(wire_type, torch.bfloat16)).contiguous()
        if cast.dtype == torch.bfloat16:
            arrays[name + _BFLOAT16_TAG] = cast.view(torch.int16).numpy()
        else:
            arrays[name] = cast.numpy()
    return arrays


def layout(state: Mapping[str, Tensor], wire_type: WireType) -> dict[str, Layout]:
    """Number type and shape of every array that :func:`encode` makes of these tensors."""
    found: dict[str, Layout] = {}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if wire_type == "int8" and names.parse(name)[1] != "head":
            found[name + _INT8_TAG] = ("int8", shape)
            found[name + _SCALE_TAG] = ("float32", (shape[_axis(name)],))
        elif wire_type in _CHANGES:
            found[name + _BFLOAT16_TAG] = ("int16", shape)
        else:
            found[name] = (wire_type, shape)
    return found


def read_npy(data: bytes, expected: Layout) -> NDArray[np.generic]:
    """The array in the bytes of a ``.npy`` file, as a view of them.

    The header is compared before anything is allocated, and nothing in it is evaluated: numpy's own
    reader allocates what a header claims, and reads archives and pickles too.

    Raises
    ------
    WireError
        If the bytes are no ``.npy`` file of just that number type and shape.
    """
    kind, shape = expected
    header = _NPY.match(data, 0, 1024)
    if header is None:
        raise WireError("its bytes are no array of numbers")
    dtype = np.dtype(kind)
    descr, fortran = header[2].decode("ascii", "replace"), header[3] == b"True"
    if descr != np.lib.format.dtype_to_descr(dtype):
        raise WireError(f"it is {_dtype_name(descr)}; expected {kind}")
    own = tuple(int(size) for size in re.findall(rb"\d+", header[4]))
    if own != shape:
        raise WireError(f"has shape {own}; the plan asks for {shape}")
    if len(data) - header.end() != math.prod(shape) * dtype.itemsize:
        raise WireError(f"{len(data)} bytes are not those of {kind} {shape}")
    flat = np.frombuffer(data, dtype, offset=header.end())
    return flat.reshape(shape, order="F" if fortran else "C")


def payload_bytes(data: bytes) -> int:
    """Bytes of the numbers in a ``.npy`` file; of what is no such file, all."""
    header = _NPY.match(data, 0, 1024)
    return len(data) - (header.end() if header else 0)


def _dtype_name(descr: str) -> str:
    try:
        return np.dtype(descr).name
    except TypeError:
        return "of an unknown type"


def decode(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """Inverse of :func:`encode`; tensors are float32 copies on the CPU.

    Raises
    ------
    WireError
        For an array of another type, two arrays of one name, or int8 without its scales.
    """
    state: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, array in arrays.items():
        plain, _, tag = name.partition("|")
        tag = f"|{tag}" if tag else ""
        expected = _READ_AS.get(tag, () if tag else ("float32", "float16"))
        if array.dtype.name not in expected:
            raise WireError(
                f"array {name!r} is {array.dtype.name}; expected {' or '.join(expected) or 'none'}"
            )
        tensor = torch.from_numpy(np.array(array))
        if tag == _SCALE_TAG:
            scales[plain] = tensor
            continue
        if plain in state:
            raise WireError(f"array {plain!r} came twice")
        state[plain] = tensor.view(torch.bfloat16).float() if tag == _BFLOAT16_TAG else tensor
    for name, tensor in state.items():
        if tensor.dtype == torch.int8:
            state[name] = _from_int8(name, tensor, scales.pop(name, None))
        else:
            state[name] = tensor.float()
    if scales:
        raise WireError(f"scales of {sorted(scales)} came without values")
    return state


def round_trip(state: Mapping[str, Tensor], wire_type: WireType) -> dict[str, Tensor]:
    """What the other side will hold after encoding and decoding."""
    if wire_type == "int8":
        return decode(encode(state, wire_type))
    return {name: t.to(_TYPES[wire_type]).float() for name, t in state.items()}


def encode_update(
    trained: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    wire_type: WireType,
    generator: torch.Generator,
) -> Arrays:
    """Encode what a client trained, in some types as the change from what it was given.

    Parameters
    ----------
    trained : Mapping[str, Tensor]
        The tensors that moved; of their leading directions, if the client lowered its rank.
    given : Mapping[str, Tensor]
        At least the same names, as they arrived.
    wire_type : WireType
        What the run sets.
    generator : torch.Generator
        See :func:`encode`.
    """
    if wire_type in _CHANGES:
        trained = {
            name: tensor.detach().cpu().float() - leading(given[name], tensor)
            for name, tensor in trained.items()
        }
    return encode(trained, wire_type, generator)


def decode_update(
    arrays: Mapping[str, NDArray[np.generic]],
    given: Mapping[str, Tensor],
    wire_type: WireType,
) -> dict[str, Tensor]:
    """Inverse of :func:`encode_update`, but for rounding.

    A tensor that was not given stays as it came, for whoever checks the names.

    Raises
    ------
    WireError
        As :func:`decode`, and for a change whose shape is not that of what was given.
    """
    state = decode(arrays)
    if wire_type not in _CHANGES:
        return state
    for name, change in state.items():
        if name in given and given[name].shape != change.shape:
            raise WireError(
                f"{name} has shape {tuple(change.shape)}; the plan asks for "
                f"{tuple(given[name].shape)}"
            )
    return {n: given[n] + change if n in given else change for n, change in state.items()}


def leading(given: Tensor, like: Tensor) -> Tensor:
    """The leading part of a tensor, in another's shape."""
    return given[tuple(slice(0, size) for size in like.shape)]


def _axis(name: str) -> int:
    """Axis of a factor along which its directions lie."""
    return 0 if names.parse(name)[1] == "a" else 1


def _to_int8(tensor: Tensor, axis: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Whole numbers in ±127, and the scale of each direction, (directions,)."""
    scales = tensor.abs().amax(1 - axis) / _LARGEST if tensor.numel() else tensor.new_zeros(0)
    divisor = torch.where(scales > 0, scales, 1.0).unsqueeze(1 - axis)
    exact = tensor / divisor
    if generator is None:
        whole = exact.round()
    else:
        whole = (exact + torch.rand(exact.shape, generator=generator)).floor()
    return whole.clamp(-_LARGEST, _LARGEST).to(torch.int8).contiguous(), scales.contiguous()


def _from_int8(name: str, tensor: Tensor, scales: Tensor | None) -> Tensor:
    if names.parse(name)[1] == "head" or tensor.dim() != 2:
        raise WireError(f"array {name!r} is int8, which only factors are")
    axis = _axis(name)
    if scales is None or scales.shape != (tensor.shape[axis],):
        shape = None if scales is None else tuple(scales.shape)
        raise WireError(f"int8 array {name!r} of {tensor.shape[axis]} directions: scales {shape}")
    return tensor.float() * scales.unsqueeze(1 - axis)
