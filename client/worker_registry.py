"""Where the workers of this user's SuperNodes are found, and what each was started with."""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rankfit.client.accelerate_config import DataParallel
from rankfit.client.device import OwnMemory
from rankfit.client.policy import Policy, everything
from rankfit.client.worker_protocol import Request
from rankfit.configs.faults import Faulty
from rankfit.configs.settings import RunSettings, from_flat, to_flat


@dataclass(frozen=True)
class ProcessHandle:
    """A process.

    Attributes
    ----------
    pid : int
        Its id.
    started : int
        When it started, in the kernel's clock ticks since boot (0 = the system does not tell).
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "ProcessHandle":
        """The process that has this id now, or had it: see :meth:`alive`."""
        return cls(pid, _stat(pid)[1])

    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        if self.pid <= 0:
            return False
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            pass  # it is there, under another user
        except OSError:
            return False
        state, started = _stat(self.pid)
        return state not in ("Z", "X") and started == self.started


def _stat(pid: int) -> tuple[str, int]:
    """State and start time from ``/proc``; ("", 0) where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return fields[0], int(fields[19])


#: A Unix socket's address has 108 bytes on Linux and 104 elsewhere, the final zero included.
_LONGEST_ADDRESS = 103
_LOGS_KEPT = 20
_REMOVALS = 3
#: First letter of a folder that is being made: whoever looks does not hold the lock.
_HIDDEN = "."


class WorkerDirError(Faulty, RuntimeError):
    """The folder of sockets cannot be used."""

    code = "worker-start"


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is for.

    Attributes
    ----------
    run_id, node_id : int
        Flower's.
    supernode : ProcessHandle
        The process that starts one for every message; the worker ends with it.
    settings : RunSettings
        The run.
    data_path : str or None
        The node's own data folder.
    group : DataParallel
        The processes that train together.
    policy : Policy
        What the node allows.
    """

    run_id: int
    node_id: int
    supernode: ProcessHandle
    settings: RunSettings
    data_path: str | None
    group: DataParallel = field(default_factory=DataParallel)
    policy: Policy = field(default_factory=everything)

    @property
    def node_key(self) -> str:
        """Name of this SuperNode among all of this user; one that was restarted has another."""
        text = f"{self.node_id} {self.supernode.pid} {self.supernode.started}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def key(self) -> str:
        """Name of this run on this SuperNode."""
        return f"{self.node_key}-{self.run_id:x}"

    @property
    def limit_bytes(self) -> int:
        """Bytes that one message's arrays may have."""
        return round(self.settings.client.message_mib * 2**20)


@dataclass(frozen=True)
class WorkerStart:
    """A WorkerSpec, and what proxy and worker share.

    Attributes
    ----------
    spec : WorkerSpec
        What the worker is for.
    token : str
        Secret that every message must bring.
    log : Path
        The worker's log.
    prefetch : Request or None
        What to load before the first message.
    """

    spec: WorkerSpec
    token: str
    log: Path
    prefetch: Request | None


@dataclass(frozen=True)
class WorkerDir:
    """Folder of one worker."""

    folder: Path

    @property
    def socket(self) -> Path:
        """Its socket; there a moment before it listens."""
        return self.folder / "socket"

    def write(self, start: WorkerStart) -> None:
        """Write down what the worker is started with, readable by the user alone."""
        spec = start.spec
        record = {
            "run-id": spec.run_id,
            "node-id": spec.node_id,
            "supernode": asdict(spec.supernode),
            "settings": to_flat(spec.settings),
            "data-path": spec.data_path,
            "group": asdict(spec.group),
            "policy": spec.policy.model_dump(),
            "token": start.token,
            "log": str(start.log),
            "prefetch": start.prefetch.header() if start.prefetch else None,
        }
        _write(self.folder / "start.json", json.dumps(record))

    def read(self) -> WorkerStart:
        """Inverse of :meth:`write`."""
        record = json.loads((self.folder / "start.json").read_text(encoding="utf-8"))
        spec = WorkerSpec(
            record["run-id"],
            record["node-id"],
            ProcessHandle(**record["supernode"]),
            from_flat(record["settings"]),
            record["data-path"],
            DataParallel(**record["group"]),
            Policy.model_validate(record["policy"]),
        )
        prefetch = Request.from_header(record["prefetch"], {}) if record["prefetch"] else None
        return WorkerStart(spec, record["token"], Path(record["log"]), prefetch)

    def write_process(self, process: ProcessHandle) -> None:
        """Write down which process the worker is."""
        _write(self.folder / "process.json", json.dumps(asdict(process)))

    def process(self) -> ProcessHandle | None:
        """The worker's process; None if it was never written down."""
        try:
            return ProcessHandle(**json.loads((self.folder / "process.json").read_text("utf-8")))
        except (OSError, ValueError):
            return None

    def write_held(self, gpu_bytes: int, context_bytes: int) -> None:
        """Write down what the worker holds of the GPU between messages, in bytes."""
        new = self.folder / "held.new"
        new.unlink(missing_ok=True)
        _write(new, f"{gpu_bytes} {context_bytes}")
        new.replace(self.folder / "held")

    def own_memory(self) -> OwnMemory | None:
        """What the worker holds of the GPU between messages; None if it does not run."""
        process = self.process()
        if process is None or not process.alive():
            return None
        try:
            gpu_bytes, context_bytes = (self.folder / "held").read_text("utf-8").split()
            return OwnMemory(process.pid, int(gpu_bytes), int(context_bytes))
        except (OSError, ValueError):  # it has not said
            return OwnMemory(process.pid, 0)

    def alive(self) -> bool:
        """Whether the worker's process runs."""
        process = self.process()
        return process is not None and process.alive()

    def remove(self) -> None:
        """Remove the folder; a worker that still runs ends then."""
        for _ in range(_REMOVALS):  # the worker may be writing a file into it
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return


def new_worker_dir(start: WorkerStart) -> WorkerDir:
    """Make the folder of a new worker, with what it is started with; it appears whole.

    Raises
    ------
    WorkerDirError
        If the socket's path would be longer than a system allows.
    """
    hidden = Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}{start.spec.key}-", dir=base_folder()))
    place = WorkerDir(hidden.with_name(hidden.name.removeprefix(_HIDDEN)))
    if len(os.fsencode(place.socket)) > _LONGEST_ADDRESS:
        hidden.rmdir()
        raise WorkerDirError(
            f"the socket's path {place.socket} is longer than {_LONGEST_ADDRESS} bytes; set "
            "XDG_RUNTIME_DIR to a shorter folder of the SuperNode's user"
        )
    WorkerDir(hidden).write(start)
    hidden.rename(place.folder)
    return place


def new_start(spec: WorkerSpec, prefetch: Request | None) -> WorkerStart:
    """A start with a new token and a new log, under Flower's home; old logs are deleted."""
    home = os.environ.get("FLWR_HOME") or "~/.flwr"
    folder = Path(home).expanduser().resolve() / "rankfit"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    logs = sorted(folder.glob("worker-*.log"), key=lambda path: path.stat().st_mtime)
    for old in logs[: max(len(logs) - _LOGS_KEPT + 1, 0)]:
        old.unlink(missing_ok=True)
    unique = secrets.token_hex(3)
    log = folder / f"worker-run-{spec.run_id}-node-{spec.node_id}-{unique}.log"
    _write(log, "")
    return WorkerStart(spec, secrets.token_hex(32), log, prefetch)


def worker_dirs(prefix: str = "") -> list[WorkerDir]:
    """Folders of workers, alive or not, whose name begins with ``prefix``."""
    return [
        WorkerDir(path)
        for path in sorted(base_folder().iterdir())
        if path.name.startswith(prefix) and not path.name.startswith(_HIDDEN)
    ]


def sweep() -> None:
    """Remove what workers left that were killed; the caller holds the lock."""
    for path in base_folder().iterdir():
        if not WorkerDir(path).alive():
            WorkerDir(path).remove()


def stop(place: WorkerDir, grace: float = 10.0) -> None:
    """End a worker: by its own will within ``grace`` seconds, or without; and remove its folder."""
    with locked():  # who starts it has then said which process it is
        process = place.process()
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process is None or not process.alive():
            break
        with suppress(ProcessLookupError):
            os.kill(process.pid, sign)
        deadline = time.monotonic() + grace
        while process.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
    place.remove()


def base_folder() -> Path:
    """Folder that holds those of all workers; made on first use.

    It is ``rankfit`` in ``XDG_RUNTIME_DIR``, or ``rankfit-UID`` in the folder of temporary files.

    Raises
    ------
    WorkerDirError
        If it belongs to another user, or others can enter it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        base = Path(runtime) / "rankfit"
    else:
        base = Path(tempfile.gettempdir()) / f"rankfit-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise WorkerDirError(
            f"{base} must be a folder of this user that nobody else can enter (mode 0700), since "
            "workers listen in it; remove it, or set XDG_RUNTIME_DIR"
        )
    return base


@contextmanager
def locked() -> Iterator[None]:
    """Keep others from starting workers while the block lasts."""
    handle = os.open(base_folder(), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
