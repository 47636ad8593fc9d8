"""What a client is asked to do and what it answers, as plain values: no torch, no Flower."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["prefetch", "train", "evaluate", "finish"]
Arrays = Mapping[str, NDArray[np.generic]]
Metrics = Mapping[str, int | float]
Value = str | int | float | bool | None | list[str] | list[int]


@dataclass(frozen=True)
class Request:
    """One message to a client.

    Attributes
    ----------
    kind : {"prefetch", "train", "evaluate", "finish"}
        ``prefetch`` loads what the others need; ``finish`` ends a worker.
    plan : Mapping[str, Value]
        The message's ``plan`` record: round, scale, fingerprint, and the plan itself.
    arrays : Mapping[str, NDArray]
        The adapter as it travelled.
    partition : int or None
        Position of this client among those that share a data set; None = it owns all of it.
    partitions : int
        Number of those clients.
    cap_bytes : int or None
        Device memory that must not be exceeded (None = no limit).
    """

    kind: Kind
    plan: Mapping[str, Value] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    partition: int | None = None
    partitions: int = 1
    cap_bytes: int | None = None

    def header(self) -> dict[str, object]:
        """All but the arrays, for JSON."""
        return {
            "kind": self.kind,
            "plan": dict(self.plan),
            "partition": self.partition,
            "partitions": self.partitions,
            "cap-bytes": self.cap_bytes,
        }

    @classmethod
    def from_header(cls, header: Mapping[str, object], arrays: Arrays) -> "Request":
        """Inverse of :meth:`header`.

        Raises
        ------
        ValueError
            If a field is missing or of another type.
        """
        kind, plan = header.get("kind"), header.get("plan")
        partition, partitions = header.get("partition"), header.get("partitions")
        cap = header.get("cap-bytes")
        if kind not in ("prefetch", "train", "evaluate", "finish"):
            raise ValueError(f"kind is {kind!r}; expected prefetch, train, evaluate or finish")
        if not isinstance(plan, dict):
            raise ValueError("a request's plan must be an object")
        if not isinstance(partition, int | None) or not isinstance(cap, int | None):
            raise ValueError("a request's partition and cap-bytes must be whole numbers or null")
        if not isinstance(partitions, int):
            raise ValueError("a request's partitions must be a whole number")
        return cls(kind, plan, arrays, partition, partitions, cap)


@dataclass(frozen=True)
class Answer:
    """The arrays that moved (none after an evaluation) and what was measured."""

    arrays: Arrays = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
