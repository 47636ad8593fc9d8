"""What every reader of data gives back, before labels are numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DataError(ValueError):
    """Data that is missing or cannot be used."""


@dataclass(frozen=True)
class Raw:
    """Inputs and labels as they were read.

    ``names`` are the classes that the data itself declares (ClassLabel, folders); None where it
    only holds labels. ``origin`` names the data in errors. ``groups`` are the values of
    ``partition.column``.
    """

    origin: str
    inputs: Sequence[Any]
    labels: Sequence[Any]
    names: tuple[str, ...] | None = None
    groups: Sequence[Any] | None = None


@dataclass(frozen=True)
class Rows(Sequence[Any]):
    """Some rows of a sequence, in an order, without a copy."""

    whole: Sequence[Any]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[int(self.rows[index])]
