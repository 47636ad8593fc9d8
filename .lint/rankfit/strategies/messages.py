"""Flower records and messages ↔ the plain values that the rest of RankFit works with."""

from collections.abc import Mapping
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from rankfit.estimator.report import DeviceReport

QUERY = "query.capabilities"
FINISH = "query.finish"
TRAIN = "train"
EVALUATE = "evaluate"

#: Flower's error codes; 3, 4 and 5 are written by the SuperLink on the client's behalf.
_ERRORS = {
    0: "unknown error, or its process died",
    1: "its app could not be loaded",
    2: "it raised an error",
    3: "the message expired before it was fetched",
    4: "its reply never came",
    5: "its node is gone",
    6: "a mod refused the message",
    7: "its app bundle is invalid",
    8: "its process died",
}


def arrays_record(arrays: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """Pack named arrays."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def record_arrays(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """Unpack named arrays."""
    return {name: array.numpy() for name, array in record.items()}


def message(
    content: RecordDict, node_id: int, message_type: str, server_round: int, ttl: float
) -> Message:
    """Address new content to one node; each message has a RecordDict of its own."""
    return Message(
        content, dst_node_id=node_id, message_type=message_type, ttl=ttl, group_id=str(server_round)
    )


def failure(reply: Message) -> str:
    """Say why a reply carries an error: what happened, and the last line of the client's reason."""
    text = _ERRORS.get(reply.error.code, f"error {reply.error.code}")
    lines = [line.strip() for line in (reply.error.reason or "").splitlines() if line.strip()]
    return f"{text}: {lines[-1]}" if lines else text


def device_report(reply: Message) -> DeviceReport:
    """Read the device report out of a reply to :data:`QUERY`.

    Raises
    ------
    ValueError
        If the reply holds none, or a bad one.
    """
    if "device" not in reply.content:
        raise ValueError("the reply to the query holds no device report")
    return DeviceReport.from_dict(dict(cast(ConfigRecord, reply.content["device"])))


def keeps_worker(reply: Message) -> bool:
    """Whether the client that sent this reply to :data:`QUERY` keeps a process for more."""
    record = reply.content.config_records.get("client", ConfigRecord())
    return bool(record.get("worker", False))


def adapter_arrays(reply: Message) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an update, or none if the reply has no adapter."""
    record = reply.content.array_records.get("adapter")
    return record_arrays(record) if record is not None else {}


def metrics(reply: Message) -> dict[str, int | float]:
    """Return the plain numbers of a reply's metrics."""
    record = reply.content.metric_records.get("metrics", MetricRecord())
    return {name: value for name, value in record.items() if isinstance(value, int | float)}
