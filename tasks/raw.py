"""What every reader of data gives back, before labels are numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class DataError(ValueError):
    """Data that is missing or cannot be used."""


@dataclass(frozen=True)
class Raw:
    """Inputs and labels as they were read.

    ``names`` are the classes that the data itself declares (ClassLabel, folders); None where it
    only holds labels. ``origin`` names the data in errors.
    """

    origin: str
    inputs: Sequence[Any]
    labels: Sequence[Any]
    names: tuple[str, ...] | None = None
