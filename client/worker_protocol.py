"""What passes between a message's process and the worker: requests, answers and their frames."""

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rankfit.configs.faults import Faulty
from rankfit.configs.protocol import Instruction

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
    instruction : Instruction or None
        What the training or evaluation is of; None for the other kinds.
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
    instruction: Instruction | None = None
    arrays: Arrays = field(default_factory=dict)
    partition: int | None = None
    partitions: int = 1
    cap_bytes: int | None = None

    def __str__(self) -> str:
        number = self.instruction.round if self.instruction else "-"
        return f"{self.kind} of round {number}"

    def header(self) -> dict[str, object]:
        """All but the arrays, for JSON."""
        return {
            "kind": self.kind,
            "instruction": self.instruction and self.instruction.to_dict(),
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
        kind, instruction = header.get("kind"), header.get("instruction")
        partition, partitions = header.get("partition"), header.get("partitions")
        cap = header.get("cap-bytes")
        if kind not in ("prefetch", "train", "evaluate", "finish"):
            raise ValueError(f"kind is {kind!r}; expected prefetch, train, evaluate or finish")
        if not isinstance(instruction, dict | None):
            raise ValueError("a request's instruction must be an object or null")
        if not isinstance(partition, int | None) or not isinstance(cap, int | None):
            raise ValueError("a request's partition and cap-bytes must be whole numbers or null")
        if not isinstance(partitions, int):
            raise ValueError("a request's partitions must be a whole number")
        read = None if instruction is None else Instruction.from_dict(instruction)
        return cls(kind, read, arrays, partition, partitions, cap)


@dataclass(frozen=True)
class Answer:
    """The arrays that moved (none after an evaluation) and what was measured."""

    arrays: Arrays = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)


_MAGIC = b"RankFit1"
_PREFIX = struct.Struct(">8sIQ")
_CHUNK = 2**20
#: Bytes of JSON in one frame: a plan names every adapted module.
MAX_HEADER_BYTES = 4 * 2**20


class FrameError(Faulty, RuntimeError):
    """Bytes that are no frame, or one that is larger than allowed."""

    code = "message-size"


class Closed(FrameError):
    """The other side closed the connection, or died, before a whole frame had come."""


def send_frame(
    connection: socket.socket,
    header: Mapping[str, object],
    arrays: Mapping[str, NDArray[np.generic]] | None = None,
    *,
    limit: int,
) -> None:
    """Send one frame.

    Parameters
    ----------
    limit : int
        Bytes that the body may have.

    Raises
    ------
    FrameError
        If header or body is larger than allowed; nothing is sent then.
    OSError
        If the connection breaks.
    """
    text = json.dumps(dict(header)).encode()
    named = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    body = save(named) if named else b""
    _check_lengths(len(text), len(body), limit)
    connection.sendall(_PREFIX.pack(_MAGIC, len(text), len(body)))
    connection.sendall(text)
    connection.sendall(body)


def receive_header(connection: socket.socket, limit: int) -> tuple[dict[str, Any], int]:
    """Read a frame up to its body; returns the header and the length of the body in bytes.

    Raises
    ------
    Closed
        If the connection ends before.
    FrameError
        If the bytes are no frame, or a length is above its limit.
    """
    magic, header_bytes, body_bytes = _PREFIX.unpack(_read(connection, _PREFIX.size))
    if magic != _MAGIC:
        raise FrameError("the other side does not speak RankFit's protocol, or another version")
    _check_lengths(header_bytes, body_bytes, limit)
    try:
        header = json.loads(_read(connection, header_bytes))
    except ValueError as error:
        raise FrameError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FrameError("the header is not a JSON object")
    return header, body_bytes


def receive_body(connection: socket.socket, length: int) -> dict[str, NDArray[np.generic]]:
    """Read the arrays of a frame whose header has been read.

    Raises
    ------
    Closed, FrameError
        See :func:`receive_header`.
    """
    data = _read(connection, length)
    if not data:
        return {}
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise FrameError(f"the body is not in the safetensors format: {error}") from error


def receive_frame(
    connection: socket.socket, limit: int
) -> tuple[dict[str, Any], dict[str, NDArray[np.generic]]]:
    """Read a whole frame from a side that is trusted."""
    header, length = receive_header(connection, limit)
    return header, receive_body(connection, length)


def _check_lengths(header: int, body: int, limit: int) -> None:
    if header > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {header} bytes is above the limit of {MAX_HEADER_BYTES}")
    if body > limit:
        raise FrameError(
            f"a message of {body} bytes is above the limit of {limit}; raise client.message-mib"
        )


def _read(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        try:
            part = connection.recv(min(_CHUNK, length - len(parts)))
        except ConnectionError as error:
            raise Closed(f"the connection broke: {error}") from error
        if not part:
            raise Closed("the connection was closed")
        parts += part
    return bytes(parts)
