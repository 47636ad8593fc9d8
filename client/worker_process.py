"""The worker: one process per device and run that keeps libraries, base, data and CUDA context."""

import gc
import hmac
import logging
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rankfit.client.data_parallel import DataParallelWorkers, grouped
from rankfit.client.nvml import Gpu, find_gpu
from rankfit.client.worker_protocol import (
    Answer,
    Closed,
    FrameError,
    Request,
    receive_body,
    receive_header,
    send_frame,
)
from rankfit.client.worker_registry import ProcessHandle, WorkerDir, WorkerStart
from rankfit.configs.faults import Faulty, fault_of

if TYPE_CHECKING:
    from rankfit.client.workspace import Workspace

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25


class Life:
    """Watches over a worker's end in a thread of its own, whatever the main thread does.

    Parameters
    ----------
    place : WorkerDir
        The worker's folder; removed at the end.
    supernode : ProcessHandle
        The process that the worker must not outlive.
    idle_seconds : float
        How long the worker waits for a message.
    """

    def __init__(self, place: WorkerDir, supernode: ProcessHandle, idle_seconds: float) -> None:
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


_BACKLOG = 64
#: A side that has connected must bring its message within this time.
_READ_SECONDS = 60.0


class Refused(Faulty, RuntimeError):
    """A message that is not served."""

    code = "message-bad"


class Worker:
    """Serves the messages of one run on one device.

    Parameters
    ----------
    place : WorkerDir
        Its folder.
    start : WorkerStart
        What it was started with.
    life : Life
        Is told what is served.
    """

    def __init__(self, place: WorkerDir, start: WorkerStart, life: Life) -> None:
        self._place, self._start, self._life = place, start, life
        self._workspace: Workspace | None = None
        self._workers: DataParallelWorkers | None = None
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
                self._reply(connection, _told(error))
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
        limit = self._start.spec.limit_bytes
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
        what = str(request)
        log.info("%s: begins, %s", what, _ranks(request))
        try:
            answer = self._perform(request)
        except Exception as error:  # the worker outlives whatever a message does
            log.exception("%s: failed", what)
            if self._workers is not None:
                self._workers.settle()
            return _told(error), Answer()
        log.info("%s: done in %.2f s", what, time.monotonic() - began)
        return {"metrics": dict(answer.metrics)}, answer

    def _perform(self, request: Request) -> Answer:
        if request.kind == "finish":
            return Answer()
        # Here, not above: torch, transformers, peft and accelerate take seconds to import.
        from rankfit.client.request_handler import perform

        spec = self._start.spec
        if self._workers is None and spec.group.size > 1:
            self._workers = DataParallelWorkers(self._place, spec, self._life.end)
        if self._workspace is None:
            before = _free_gpu_bytes()
            self._workspace = grouped(spec, self._place)
            self._workspace.open_device()
            self._context_bytes = max(before - _free_gpu_bytes(), 0)
        if self._workers is not None:
            self._workers.tell(request)
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
                limit=self._start.spec.limit_bytes,
            )
        except FrameError as error:
            log.error("%s", error)
            self._reply(connection, _told(error))
        except OSError as error:
            log.warning("nobody takes the answer: %s", error)

    def _tidy(self) -> None:
        """Give back what the message took; the base stays, where the settings want it."""
        gc.collect()
        if self._workspace is None:
            return
        if not self._start.spec.settings.client.keep_base_on_device:
            self._workspace.park()
        self._workspace.free()
        held = self._workspace.own_memory()
        if held.context_bytes < 0:  # NVML does not tell: what opening the context took
            held = replace(held, gpu_bytes=held.gpu_bytes + self._context_bytes)
        self._place.write_held(held.gpu_bytes, held.context_bytes)


def _free_gpu_bytes() -> int:
    """What NVML says is free on the GPU that CUDA shows this process; 0 where it does not."""
    gpu = find_gpu(os.environ, os.getpid())
    return gpu.memory.free_bytes if isinstance(gpu, Gpu) and gpu.memory else 0


def _told(error: Exception) -> dict[str, object]:
    """An error as the worker's proxy sees it: neither leaves the machine with its text."""
    return {"error": type(error).__name__, **asdict(fault_of(error))}


def _ranks(request: Request) -> str:
    ranks = request.instruction.plan.get("ranks") if request.instruction else None
    if not isinstance(ranks, list) or not ranks:
        return "no plan"
    return f"rank {max(int(rank) for rank in ranks)}, {len(ranks)} modules"


def listen(place: WorkerDir) -> socket.socket:
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
    place = WorkerDir(Path(sys.argv[1]))
    start = place.read()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    spec = start.spec
    life = Life(place, spec.supernode, spec.settings.client.idle_seconds)
    worker = Worker(place, start, life)
    listener = listen(place)
    log.info("worker of run %d on node %d listens", spec.run_id, spec.node_id)
    life.start()
    if start.prefetch is not None:
        worker.prefetch(start.prefetch)
    life.rests()
    worker.serve(listener)
