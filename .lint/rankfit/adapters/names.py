"""PEFT's names for adapter tensors, in one place.

PEFT saves module ``m`` as ``base_model.model.m.lora_A.weight`` (r, k) and
``base_model.model.m.lora_B.weight`` (d, r), and a whole trained tensor ``t`` (a head) as
``base_model.model.t``. The names are the same for every rank; only shapes differ.
"""

from typing import Literal

#: Which factors a client trains and returns in a round; the head always moves.
Moves = Literal["both", "a", "b"]

_MOVING = {"both": ("a", "b", "head"), "a": ("a", "head"), "b": ("b", "head")}

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def a_name(module: str) -> str:
    """Name of the A factor of a module."""
    return f"{PREFIX}{module}{_A}"


def b_name(module: str) -> str:
    """Name of the B factor of a module."""
    return f"{PREFIX}{module}{_B}"


def head_name(tensor: str) -> str:
    """Name of a tensor that is trained whole."""
    return f"{PREFIX}{tensor}"


def parse(name: str) -> tuple[str, str]:
    """Split a saved name into its module or tensor and its part: ``a``, ``b`` or ``head``.

    Raises
    ------
    ValueError
        If the name is not one of PEFT's.
    """
    if not name.startswith(PREFIX):
        raise ValueError(f"adapter tensor {name!r} does not start with {PREFIX!r}")
    rest = name.removeprefix(PREFIX)
    if rest.endswith(_A):
        return rest.removesuffix(_A), "a"
    if rest.endswith(_B):
        return rest.removesuffix(_B), "b"
    if ".lora_" in rest:
        raise ValueError(f"adapter tensor {name!r} is neither lora_A, lora_B nor a head tensor")
    return rest, "head"


def moves_with(name: str, moves: Moves) -> bool:
    """Say whether a tensor is trained and returned when ``moves`` move."""
    return parse(name)[1] in _MOVING[moves]
