"""One client trained by several processes: the processes beside its worker, and what they share."""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

import rankfit
from rankfit.client.accelerate_config import DataParallel
from rankfit.client.worker_protocol import FrameError, Request, receive_frame, send_frame
from rankfit.client.worker_registry import WorkerDir, WorkerSpec
from rankfit.configs.faults import Faulty
from rankfit.tasks.lora import training_device

if TYPE_CHECKING:
    from rankfit.client.workspace import Workspace


class OtherFailed(Faulty, RuntimeError):
    """Another process of the group failed; its own log line says how."""

    code = "worker-group"


class Group:
    """The processes that train one client, as one of them sees them.

    A process that fails says so at the next meeting of all (:meth:`agree`), where every process
    then raises: none is left waiting for another. Alone, all of this does nothing.

    Parameters
    ----------
    size, rank : int
        Number of processes and the position of this one; process 0 answers the server.
    device : torch.device
        Where this process trains.
    """

    def __init__(self, size: int, rank: int, device: torch.device) -> None:
        self.size, self.rank, self.device = size, rank, device
        self._meets = False

    @classmethod
    def alone(cls) -> "Group":
        """One process, on the first visible GPU or on the CPU."""
        return cls(1, 0, training_device())

    @classmethod
    def joined(cls, meeting_place: Path, *, cpu: bool) -> "Group":
        """Join the group that the environment names; waits for the others.

        They find one another through a file: torch's own store would listen on every interface of
        the machine.
        """
        from accelerate import PartialState

        # A process that dies ends the group (crew.py): no wait of a living one is too long.
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        state = PartialState(
            cpu=cpu,
            timeout=timedelta(days=1),
            store=distributed.FileStore(str(meeting_place), size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
        )
        return cls(state.num_processes, state.process_index, state.device)

    @property
    def leads(self) -> bool:
        """Whether this process answers for all."""
        return self.rank == 0

    def share(self, batch: Sequence[int]) -> list[int]:
        """Part of a batch for this process; the parts differ by one sample at most."""
        return list(batch[self.rank :: self.size])

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """All processes do this together: what fails here in one fails in all."""
        self._meets = self.size > 1
        try:
            yield
        except OtherFailed:
            raise
        except Exception as error:
            self.fail(error)
            raise
        finally:
            self._meets = False

    def part(self) -> None:
        """The processes do not meet again in this training."""
        self._meets = False

    def fail(self, error: Exception) -> None:
        """Tell the others at their next meeting that this process has failed."""
        if self._meets and not getattr(error, "reported", False):
            memory = isinstance(error, torch.OutOfMemoryError)
            self._sum([float(memory), float(not memory)])
            error.reported = True  # type: ignore[attr-defined]

    def agree(self, *values: float) -> list[float]:
        """Sum of each value over the group.

        Raises
        ------
        torch.OutOfMemoryError
            If a process has run out of memory.
        OtherFailed
            If one has failed otherwise.
        """
        if self.size == 1:
            return list(values)
        memory, other, *sums = self._sum([0.0, 0.0, *values])
        if other:
            self._meets = False
            raise OtherFailed("another process of this client failed; the worker's log says how")
        if memory:
            error = torch.OutOfMemoryError("another process of this client ran out of memory")
            error.reported = True  # type: ignore[attr-defined]
            raise error
        return sums

    def largest(self, value: int) -> int:
        """Largest value of the group; right after :meth:`agree`."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return int(tensor)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the group in place; right after :meth:`agree`."""
        if self.size == 1:
            return
        waiting = []
        for parameter in parameters:
            if parameter.grad is None:  # no sample of the batch was this process's
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(distributed.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()

    def _sum(self, values: list[float]) -> list[float]:
        """Sums over the group; always of eight numbers: who fails meets who does not."""
        tensor = torch.zeros(8, dtype=torch.float64, device=self.device)
        tensor[: len(values)] = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()[: len(values)]]


log = logging.getLogger(__name__)

_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from rankfit.client.data_parallel import main; main()"
)
#: What all processes do; the worker alone evaluates.
_SHARED = ("prefetch", "train")
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
#: A process that dies breaks the exchange of gradients at once; its end is read within this time.
_NOTICE_SECONDS = 1.0
#: Once it is read, ``on_end`` ends this process within it.
_END_SECONDS = 60.0


class DataParallelWorkers:
    """The other processes of a worker's group.

    Parameters
    ----------
    place : WorkerDir
        The worker's folder.
    spec : WorkerSpec
        What the worker is for; ``spec.group`` says how many processes there are to be.
    on_end : callable
        Called from another thread with a reason when one of them ends.
    """

    def __init__(self, place: WorkerDir, spec: WorkerSpec, on_end: Callable[[str], None]) -> None:
        self._limit = spec.limit_bytes
        self._sockets: list[socket.socket] = []
        os.environ.update(_environment(spec.group, 0))
        root = Path(rankfit.__file__).resolve().parents[1]
        for rank in range(1, spec.group.size):
            mine, theirs = socket.socketpair()
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(root), str(place.folder)],
                stdin=theirs.fileno(),
                env=os.environ | _environment(spec.group, rank),
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


def grouped(spec: WorkerSpec, place: WorkerDir) -> "Workspace":
    """Return the workspace of this process, its group joined."""
    from rankfit.client.data_parallel import Group
    from rankfit.client.workspace import workspace

    space = workspace(spec.settings, spec.data_path, spec.policy)
    if spec.group.size > 1:
        space.group = Group.joined(place.folder / "store", cpu=spec.group.cpu)
    return space


def main() -> None:
    """Entry point of the others; the one argument is the worker's folder."""
    place = WorkerDir(Path(sys.argv[1]))
    spec = place.read().spec
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    listener = socket.socket(fileno=os.dup(0))
    threading.Thread(target=_listen, args=(listener, spec.limit_bytes, requests)).start()
    from rankfit.client.request_handler import perform

    space = grouped(spec, place)
    space.open_device()
    while True:
        request = requests.get()
        try:
            perform(space, request)
        except Exception:  # the worker has the same error, or was told of this one
            log.exception("%s: failed", request.kind)
        gc.collect()
        if not spec.settings.client.keep_base_on_device:
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


def _environment(group: DataParallel, rank: int) -> dict[str, str]:
    """What Accelerate and torch read in a process of a group."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(group.size),
        "LOCAL_WORLD_SIZE": str(group.size),
        # Accelerate asks for the first; what the processes exchange stays on the machine.
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
        "NCCL_SOCKET_IFNAME": _LOOPBACK,
        "ACCELERATE_USE_CPU": str(group.cpu).lower(),
    }
