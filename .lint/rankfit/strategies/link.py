"""The link to a client, measured: timed payloads in the query, in both directions."""

import logging
import os
import time
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from rankfit.strategies import messages

log = logging.getLogger(__name__)

#: Seconds between two looks for a reply: an error of as much.
PAUSE = 0.01
#: Plain queries whose fastest is the latency: starting a process is part of it.
PLAIN = 2
#: Seconds that a payload must add to the latency to tell a speed.
LEAST = 0.02


@dataclass(frozen=True)
class Link:
    """A measured link; 0 Mbps = too fast for the payload to tell, so no bound.

    Attributes
    ----------
    upload_mbps, download_mbps : float
        Megabits (10⁶) per second, from and to the client.
    latency : float
        Seconds of a query without a payload and its reply.
    """

    upload_mbps: float
    download_mbps: float
    latency: float


def measure_link(grid: Grid, node_id: int, nbytes: int, timeout: float) -> Link | None:
    """Time a payload to a client and one from it; None when a reply does not come in time.

    Parameters
    ----------
    nbytes : int
        Size of each payload.
    timeout : float
        Seconds for each of the queries.
    """
    plain = [_seconds(grid, node_id, RecordDict(), timeout) for _ in range(PLAIN)]
    known = [seconds for seconds in plain if seconds is not None]
    payload = np.frombuffer(os.urandom(nbytes), dtype=np.uint8)  # nothing on the way can shrink it
    down = RecordDict({"payload": messages.arrays_record({"payload": payload})})
    up = RecordDict({"link": ConfigRecord({"reply-bytes": nbytes})})
    there, back = (_seconds(grid, node_id, content, timeout) for content in (down, up))
    if not known or there is None or back is None:
        log.warning("the link of node %d could not be measured in %.0f s", node_id, timeout)
        return None
    latency = min(known)
    return Link(_mbps(nbytes, back - latency), _mbps(nbytes, there - latency), latency)


def _mbps(nbytes: int, seconds: float) -> float:
    return nbytes * 8e-6 / seconds if seconds >= LEAST else 0.0


def _seconds(grid: Grid, node_id: int, content: RecordDict, timeout: float) -> float | None:
    """Time from sending a query to its reply; None for an error or no reply."""
    message = messages.message(content, node_id, messages.QUERY, 0, timeout)
    began = time.monotonic()
    (identity,) = grid.push_messages([message])
    while time.monotonic() - began < timeout:
        for reply in grid.pull_messages([identity]):
            return None if reply.has_error() else time.monotonic() - began
        time.sleep(PAUSE)
    return None
