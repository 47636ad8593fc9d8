"""The worker: one process per device and run that keeps libraries, base, data and CUDA context.

Started by :mod:`rankfit.client.messenger`. It serves
one message at a time, in the order in which they came. What is costly to import is imported after
the socket listens, so that a message finds it early and waits its turn.
"""

import gc
import hmac
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfit.client.crew import Crew, grouped
from rankfit.client.frames import (
    Closed,
    FrameError,
    receive_body,
    receive_header,
    send_frame,
)
from rankfit.client.nvml import Gpu, find_gpu
from rankfit.client.place import Place, Start
from rankfit.client.request import Answer, Request
from rankfit.client.worker_life import Life

if TYPE_CHECKING:
    from rankfit.client.workspace import Workspace

log = logging.getLogger(__name__)

_BACKLOG = 64
#: A side that has connected must bring its message within this time.
_READ_SECONDS = 60.0


class Refused(RuntimeError):
    """A message that is not served."""


class Worker:
    """Serves the messages of one run on one device.

    Parameters
    ----------
    place : Place
        Its folder.
    start : Start
        What it was started with.
    life : Life
        Is told what is served.
    """

    def __init__(self, place: Place, start: Start, life: Life) -> None:
        self._place, self._start, self._life = place, start, life
        self._workspace: Workspace | None = None
        self._crew: Crew | None = None
        self._context_bytes = 0

    def prefetch(self, request: Request) -> None:
        """Load before the first message; what fails here fails again, and is told, there."""
        began = time.monotonic()
        try:
            self._perform(request)
        except Exception:  # whatever model and data can raise
            log.exception("prefetch failed")
        else:
            log.info("prefetched in %.2f s", time.monotonic() - began)
        self._tidy()

    def serve(self, listener: socket.socket) -> None:
        """Serve connections for ever; :class:`Life` ends the process."""
        while True:
            connection, _ = listener.accept()
            with connection:
                over = self._serve(connection)
            if over:
                self._life.end("its run is over")
            self._tidy()

    def _serve(self, connection: socket.socket) -> bool:
        """Serve one connection; whether it said that the run is over."""
        connection.settimeout(_READ_SECONDS)
        try:
            request = self._receive(connection)
            send_frame(connection, {"accepted": True}, limit=0)
        except (FrameError, Refused, ValueError) as error:
            if not isinstance(error, Closed):
                log.warning("refused a message: %s", error)
                self._reply(connection, {"error": type(error).__name__, "reason": str(error)})
            return False
        except OSError as error:
            log.warning("a connection failed before its message had come: %s", error)
            return False
        connection.settimeout(None)
        self._life.serves(connection)
        header, answer = self._answer(request)
        self._life.rests()  # before the answer: who has it hangs up
        self._reply(connection, header, answer)
        return request.kind == "finish"

    def _receive(self, connection: socket.socket) -> Request:
        """Read a request; the token is checked before any array is taken."""
        limit = self._start.order.limit_bytes
        header, length = receive_header(connection, limit)
        token = header.get("token")
        if not isinstance(token, str) or not hmac.compare_digest(
            token.encode(), self._start.token.encode()
        ):
            raise Refused("the token is not this worker's")
        return Request.from_header(header, receive_body(connection, length))

    def _answer(self, request: Request) -> tuple[dict[str, Any], Answer]:
        """Perform a request; an exception becomes an answer that tells it."""
        began = time.monotonic()
        what = f"{request.kind} of round {request.plan.get('round', '-')}"
        log.info("%s: begins, %s", what, _ranks(request))
        try:
            answer = self._perform(request)
        except Exception as error:  # the worker outlives whatever a message does
            log.exception("%s: failed", what)
            if self._crew is not None:
                self._crew.settle()
            return {"error": type(error).__name__, "reason": str(error)}, Answer()
        log.info("%s: done in %.2f s", what, time.monotonic() - began)
        return {"metrics": dict(answer.metrics)}, answer

    def _perform(self, request: Request) -> Answer:
        if request.kind == "finish":
            return Answer()
        # Here, not above: torch, transformers, peft and accelerate take seconds to import.
        from rankfit.client.perform import perform

        order = self._start.order
        if self._crew is None and order.group.size > 1:
            self._crew = Crew(self._place, order, self._life.end)
        if self._workspace is None:
            before = _free_gpu_bytes()
            self._workspace = grouped(order)
            self._workspace.open_device()
            self._context_bytes = max(before - _free_gpu_bytes(), 0)
        if self._crew is not None:
            self._crew.tell(request)
        return perform(self._workspace, request)

    def _reply(
        self, connection: socket.socket, header: dict[str, Any], answer: Answer | None = None
    ) -> None:
        """Send an answer to a side that may be gone."""
        try:
            send_frame(
                connection,
                header,
                answer.arrays if answer else None,
                limit=self._start.order.limit_bytes,
            )
        except FrameError as error:
            log.error("%s", error)
            self._reply(connection, {"error": "FrameError", "reason": str(error)})
        except OSError as error:
            log.warning("nobody takes the answer: %s", error)

    def _tidy(self) -> None:
        """Give back what the message took; the base stays, where the settings want it."""
        gc.collect()
        if self._workspace is None:
            return
        if not self._start.order.settings.client.keep_base_on_device:
            self._workspace.park()
        self._place.write_held(self._context_bytes + self._workspace.free())


def _free_gpu_bytes() -> int:
    """What NVML says is free on the GPU that CUDA shows this process; 0 where it does not."""
    gpu = find_gpu(os.environ, os.getpid())
    return gpu.memory.free_bytes if isinstance(gpu, Gpu) and gpu.memory else 0


def _ranks(request: Request) -> str:
    ranks = request.plan.get("ranks")
    if not isinstance(ranks, list) or not ranks:
        return "no plan"
    return f"rank {max(int(rank) for rank in ranks)}, {len(ranks)} modules"


def listen(place: Place) -> socket.socket:
    """Open the worker's socket, for the user alone."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(place.socket))
    finally:
        os.umask(before)
    listener.listen(_BACKLOG)
    return listener


def main() -> None:
    """Entry point; the one argument is the worker's folder."""
    place = Place(Path(sys.argv[1]))
    start = place.read()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    order = start.order
    life = Life(place, order.supernode, order.settings.client.idle_seconds)
    worker = Worker(place, start, life)
    listener = listen(place)
    log.info("worker of run %d on node %d listens", order.run_id, order.node_id)
    life.start()
    if start.prefetch is not None:
        worker.prefetch(start.prefetch)
    life.rests()
    worker.serve(listener)
