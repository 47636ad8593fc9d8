"""Flower records and messages from the plain values that the rest of RankFit works with.

What clients send back is read in :mod:`rankfit.strategies.replies` alone.
"""

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from rankfit.configs.faults import Fault
from rankfit.configs.protocol import PLAN, Instruction

#: Characters of a client's reason that are read.
_READ = 4000
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


def origin(message: Message) -> ConfigRecord:
    """Which round of which run a message is of: an update carries it back."""
    plan = message.content.config_records[PLAN]
    return ConfigRecord(Instruction.from_dict(plan).origin)


def failure(reply: Message) -> str:
    """Say why a reply carries an error, in words that are the server's own."""
    found = fault(reply)
    if found is not None:
        return found.sentence()
    # What else stands there may come from anyone, and hold anything: it is not shown.
    return _ERRORS.get(reply.error.code, f"error {reply.error.code}")


def fault(reply: Message) -> Fault | None:
    """The fault that a reply with an error names; None if it names none of RankFit's."""
    return Fault.read((reply.error.reason or "")[:_READ])
