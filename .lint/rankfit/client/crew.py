"""The processes that train beside a worker, where a client has several GPUs.

The worker is process 0 of a group of :class:`~rankfit.client.group.Group`: it serves the messages,
and hands each one that trains to the others over a socket pair. They end with the worker, whose end
closes their sockets; and the worker ends with any of them, since a group with a gap cannot train.
"""

import gc
import logging
import os
import queue
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import rankfit
from rankfit.client.accelerate_config import DataParallel
from rankfit.client.frames import FrameError, receive_frame, send_frame
from rankfit.client.place import Order, Place
from rankfit.client.request import Request

if TYPE_CHECKING:
    from rankfit.client.workspace import Workspace

log = logging.getLogger(__name__)

_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from rankfit.client.crew import main; main()"
)
#: What all processes do; the worker alone evaluates.
_SHARED = ("prefetch", "train")
#: A process that dies breaks the exchange of gradients at once; its end is read within this time.
_NOTICE_SECONDS = 1.0
#: Once it is read, ``on_end`` ends this process within it.
_END_SECONDS = 60.0


class Crew:
    """The other processes of a worker's group.

    Parameters
    ----------
    place : Place
        The worker's folder.
    order : Order
        What the worker is for; ``order.group`` says how many processes there are to be.
    on_end : callable
        Called from another thread with a reason when one of them ends.
    """

    def __init__(self, place: Place, order: Order, on_end: Callable[[str], None]) -> None:
        self._limit = order.limit_bytes
        self._sockets: list[socket.socket] = []
        os.environ.update(_environment(order.group, 0, _free_port()))
        root = Path(rankfit.__file__).resolve().parents[1]
        for rank in range(1, order.group.size):
            mine, theirs = socket.socketpair()
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(root), str(place.folder)],
                stdin=theirs.fileno(),
                env=os.environ | _environment(order.group, rank, int(os.environ["MASTER_PORT"])),
            )
            theirs.close()
            self._sockets.append(mine)
            name = f"process {process.pid}, {rank} of its group,"
            threading.Thread(target=_wait, args=(process, name, on_end), daemon=True).start()
            log.info("started %s", name)

    def tell(self, request: Request) -> None:
        """Hand a message to all others, if they have a part in it."""
        if request.kind in _SHARED:
            for each in self._sockets:
                send_frame(each, request.header(), request.arrays, limit=self._limit)

    def settle(self) -> None:
        """After a failure: wait until ``on_end`` has been called, if a process died.

        Both the broken exchange and the end itself are seen by this process, in either order; who
        waits is told of the end, and not of the connection that it closed. The others send nothing:
        a socket that can be read is that of one that is gone.
        """
        if select.select(self._sockets, [], [], _NOTICE_SECONDS)[0]:
            time.sleep(_END_SECONDS)


def grouped(order: Order) -> "Workspace":
    """Return the workspace of this process, its group joined."""
    from rankfit.client.group import Group
    from rankfit.client.workspace import workspace

    space = workspace(order.settings, order.data_path)
    if order.group.size > 1:
        space.group = Group.joined(cpu=order.group.cpu)
    return space


def main() -> None:
    """Entry point of the others; the one argument is the worker's folder."""
    order = Place(Path(sys.argv[1])).read().order
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    listener = socket.socket(fileno=os.dup(0))
    threading.Thread(target=_listen, args=(listener, order.limit_bytes, requests)).start()
    from rankfit.client.perform import perform

    space = grouped(order)
    space.open_device()
    while True:
        request = requests.get()
        try:
            perform(space, request)
        except Exception:  # the worker has the same error, or was told of this one
            log.exception("%s: failed", request.kind)
        gc.collect()
        if not order.settings.client.keep_base_on_device:
            space.park()
        space.free()


def _listen(listener: socket.socket, limit: int, requests: "queue.SimpleQueue[Request]") -> None:
    """Take messages until the worker is gone, whatever the main thread does then."""
    while True:
        try:
            header, arrays = receive_frame(listener, limit)
        except (FrameError, OSError):
            log.info("ends: its worker is gone")
            logging.shutdown()
            os._exit(0)
        requests.put(Request.from_header(header, arrays))


def _wait(process: "subprocess.Popen[bytes]", name: str, on_end: Callable[[str], None]) -> None:
    code = process.wait()
    on_end(f"{name} ended with {code}")


def _environment(group: DataParallel, rank: int, port: int) -> dict[str, str]:
    """What Accelerate and torch read in a process of a group."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(group.size),
        "LOCAL_WORLD_SIZE": str(group.size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": str(group.cpu).lower(),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
