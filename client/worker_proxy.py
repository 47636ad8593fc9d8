"""The worker as a message's process sees it: find or start it, hand over, bring back the answer."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import rankfit
from rankfit.client.device import OwnMemory
from rankfit.client.worker_protocol import (
    Answer,
    Closed,
    FrameError,
    Request,
    receive_frame,
    send_frame,
)
from rankfit.client.worker_registry import (
    ProcessHandle,
    WorkerDir,
    WorkerSpec,
    locked,
    new_start,
    new_worker_dir,
    sweep,
    worker_dirs,
)
from rankfit.configs.faults import Fault, Faulty

log = logging.getLogger(__name__)

#: A worker opens its socket before it imports torch; a busy machine may take this long.
_START_SECONDS = 120.0
_TRIES = 3
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from rankfit.client.worker_process import main; main()"
)


class WorkerError(Faulty, RuntimeError):
    """A worker answered with an error, died, or could not be started; names its log."""

    code = "worker-start"


def ask(spec: WorkerSpec, request: Request, uuid: str = "") -> Answer:
    """Let the worker of a run on this device do something; start it if there is none.

    Parameters
    ----------
    spec : WorkerSpec
        What the worker is for.
    request : Request
        What to do.
    uuid : str
        Of the one GPU that the worker may see ("" = whatever this process sees).

    Raises
    ------
    WorkerError
        If the work failed, the worker died while it worked, or none could be started.
    FrameError
        If the message, or its answer, is larger than ``client.message-mib``.
    """
    for _ in range(_TRIES):
        place = start(spec, uuid)
        try:
            return _hand_over(place, spec, request)
        except _NotBegun as error:
            log.warning("the worker ended before the message was begun (%s); again", error)
    raise WorkerError(
        f"{_TRIES} workers ended before they began a {request.kind} message; {_log_of(place)}"
    )


def prefetch(spec: WorkerSpec, request: Request, uuid: str = "") -> None:
    """Start the worker, unless it is there, to load base and data; does not wait for it."""
    make_room(spec)
    with locked():
        if not any(place.alive() for place in worker_dirs(f"{spec.key}-")):
            _start(spec, uuid, replace(request, kind="prefetch"))


def make_room(spec: WorkerSpec) -> None:
    """End the workers of other runs on this device, where ``client.second-run`` is ``wait``."""
    if spec.settings.client.second_run != "wait":
        return
    for place in worker_dirs(f"{spec.node_key}-"):
        if not place.folder.name.startswith(f"{spec.key}-"):
            log.info("waiting for the worker of another run on this device; %s", _log_of(place))
            _finish(place, spec)


def own_memory(spec: WorkerSpec) -> OwnMemory | None:
    """What the worker of a run on this device holds of its GPU; None without a worker."""
    found = (place.own_memory() for place in worker_dirs(f"{spec.key}-"))
    return next((own for own in found if own is not None), None)


def finish(spec: WorkerSpec) -> None:
    """End the worker of a run on this device after what it is doing; none is no error."""
    for place in worker_dirs(f"{spec.key}-"):
        _finish(place, spec)


class _NotBegun(Exception):
    """The worker ended before it accepted the message: nothing is lost."""


def start(spec: WorkerSpec, uuid: str = "") -> WorkerDir:
    """Find the worker of a run on this device, or start it; it may not listen yet."""
    make_room(spec)  # outside the lock: it may take as long as a training
    with locked():
        for place in worker_dirs(f"{spec.key}-"):
            if place.alive():
                return place
            log.warning("the worker of this run is dead; starting another (%s)", _log_of(place))
            place.remove()
        return _start(spec, uuid, None)


def _start(spec: WorkerSpec, uuid: str, prefetch: Request | None) -> WorkerDir:
    """Start a worker in a session of its own; the caller holds the lock."""
    sweep()
    start = new_start(spec, prefetch)
    place = new_worker_dir(start)
    root = Path(rankfit.__file__).resolve().parents[1]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(spec.settings.train.threads))
    if uuid:
        environment["CUDA_VISIBLE_DEVICES"] = uuid
    with start.log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, str(root), str(place.folder)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
        )
    place.write_process(ProcessHandle.of(process.pid))
    log.info("started worker %d; its log is %s", process.pid, start.log)
    return place


def _hand_over(place: WorkerDir, spec: WorkerSpec, request: Request) -> Answer:
    """Send a request and wait for its answer, however long it takes."""
    with _connected(place) as connection:
        try:
            token = place.read().token
            send_frame(
                connection,
                {**request.header(), "token": token},
                request.arrays,
                limit=spec.limit_bytes,
            )
        except FileNotFoundError as error:
            raise _NotBegun(str(error)) from error
        except OSError as error:
            log.debug("the worker takes no more of the message: %s", error)  # it says why
        try:
            header, _ = receive_frame(connection, spec.limit_bytes)
        except (Closed, OSError) as error:
            raise _NotBegun(str(error)) from error
        _raise_error(header, place)
        try:
            header, arrays = receive_frame(connection, spec.limit_bytes)
        except (Closed, OSError) as error:
            if request.kind == "finish":
                return Answer()
            raise _died(request, place) from error
        _raise_error(header, place)
        return Answer(arrays, header["metrics"])


@contextmanager
def _connected(place: WorkerDir) -> Iterator[socket.socket]:
    """Connect to a worker that may still be opening its socket."""
    deadline = time.monotonic() + _START_SECONDS
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        while True:
            try:
                connection.connect(str(place.socket))
                break
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
                if not place.alive():
                    raise _NotBegun(f"{error}; {_log_of(place)}") from error
                if time.monotonic() > deadline:
                    raise WorkerError(
                        f"the worker does not listen after {_START_SECONDS:g} s; {_log_of(place)}"
                    ) from error
                time.sleep(0.05)
        yield connection


def _finish(place: WorkerDir, spec: WorkerSpec) -> None:
    process = place.process()  # before the answer, with which its folder goes
    with suppress(_NotBegun, WorkerError):
        _hand_over(place, spec, Request("finish"))
    deadline = time.monotonic() + 10.0
    while process is not None and process.alive() and time.monotonic() < deadline:
        time.sleep(0.05)


def _raise_error(header: dict[str, object], place: WorkerDir) -> None:
    if "error" in header:
        fault = Fault(
            str(header["code"]), cast(int | None, header["row"]), str(header["kind"]),
            f"{header['error']}: {header['text']} ({_log_of(place)})",
        )  # fmt: skip
        raise WorkerError.of(fault)


def _died(request: Request, place: WorkerDir) -> WorkerError:
    """The error for a message that died with its worker; clears away what the worker left."""
    where = _log_of(place)
    with suppress(FrameError, OSError):
        place.remove()
    return WorkerError(
        f"the worker died during {request} (killed, or out of memory): this update is lost, "
        f"and the next message starts another worker; {where}",
        fault="worker-died",
    )


def _log_of(place: WorkerDir) -> str:
    try:
        return f"worker's log: {place.read().log}"
    except (OSError, ValueError, KeyError):
        return "the worker's log lies in the folder rankfit under FLWR_HOME"
