"""When a worker ends: with its SuperNode, unheard, idle, or told to."""

import logging
import math
import os
import select
import signal
import socket
import threading
import time
from types import FrameType

from rankfit.client.place import Place
from rankfit.client.watched import Watched

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25


class Life:
    """Watches over a worker's end in a thread of its own, whatever the main thread does.

    Parameters
    ----------
    place : Place
        The worker's folder; removed at the end.
    supernode : Watched
        The process that the worker must not outlive.
    idle_seconds : float
        How long the worker waits for a message.
    """

    def __init__(self, place: Place, supernode: Watched, idle_seconds: float) -> None:
        self._place, self._supernode, self._idle = place, supernode, idle_seconds
        self._lock = threading.Lock()
        self._served: socket.socket | None = None
        self._since = math.inf  # not idle before the first rest

    def start(self) -> None:
        """Begin to watch; ``SIGTERM`` and ``SIGINT`` end the worker from now on."""
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, self._told)
        threading.Thread(target=self._watch, name="life", daemon=True).start()

    def serves(self, connection: socket.socket) -> None:
        """Work for this connection begins; without it the work is worth nothing."""
        with self._lock:
            self._served = connection

    def rests(self) -> None:
        """No message is served; the time of idleness begins anew."""
        with self._lock:
            self._served, self._since = None, time.monotonic()

    def end(self, reason: str) -> None:
        """Remove the worker's folder and end the process, without unwinding what trains."""
        log.info("ends: %s", reason)
        self._place.remove()
        logging.shutdown()
        os._exit(0)

    def _told(self, number: int, _frame: FrameType | None) -> None:
        self.end(f"told to by {signal.Signals(number).name}")

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            reason = self._reason()
            if reason:
                self.end(reason)

    def _reason(self) -> str:
        """Why the worker must end now; "" if it need not."""
        if not self._supernode.alive():
            return f"its SuperNode (process {self._supernode.pid}) is gone"
        if not self._place.folder.is_dir():
            return "its folder is gone"
        with self._lock:
            if self._served is not None:
                return "nobody waits for its answer any more" if _closed(self._served) else ""
            if time.monotonic() - self._since > self._idle:
                return f"no message for {self._idle:g} s"
        return ""


def _closed(connection: socket.socket) -> bool:
    """Whether the other side has hung up; it sends nothing while it waits for an answer."""
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True
