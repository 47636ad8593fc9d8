"""Encoding of tensors for the wire: names and NumPy arrays, in the type that the run sets.

NumPy has no bfloat16 and Flower refuses it, so it travels as the same 16 bits in int16, marked by a
tag on the name. Every float tensor is decoded to float32.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WireType = Literal["float32", "float16", "bfloat16"]

_BFLOAT16_TAG = "|bfloat16"
_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Bytes of one value on the wire.
WIRE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class WireError(ValueError):
    """Arrays that cannot be decoded."""


def encode(state: Mapping[str, Tensor], wire_type: WireType) -> dict[str, NDArray[np.generic]]:
    """Turn tensors of any device into arrays of the wire type (bfloat16 as tagged int16)."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, tensor in state.items():
        cast = tensor.detach().to("cpu", _TYPES[wire_type]).contiguous()
        if wire_type == "bfloat16":
            arrays[name + _BFLOAT16_TAG] = cast.view(torch.int16).numpy()
        else:
            arrays[name] = cast.numpy()
    return arrays


def decode(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """Inverse of :func:`encode`; tensors are float32 copies on the CPU.

    Raises
    ------
    WireError
        For an array of another type, or two arrays of one name.
    """
    state: dict[str, Tensor] = {}
    for name, array in arrays.items():
        plain = name.removesuffix(_BFLOAT16_TAG)
        expected = ("int16",) if plain != name else ("float32", "float16")
        if array.dtype.name not in expected:
            raise WireError(
                f"array {name!r} is {array.dtype.name}; expected {' or '.join(expected)}"
            )
        if plain in state:
            raise WireError(f"array {plain!r} came twice")
        tensor = torch.from_numpy(np.array(array))
        if plain != name:
            tensor = tensor.view(torch.bfloat16)
        state[plain] = tensor.float()
    return state


def round_trip(state: Mapping[str, Tensor], wire_type: WireType) -> dict[str, Tensor]:
    """What the other side will hold after encoding and decoding."""
    return {name: t.to(_TYPES[wire_type]).float() for name, t in state.items()}
