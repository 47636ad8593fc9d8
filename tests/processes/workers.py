"""A deployment whose workers can be looked at: sockets in a private folder, logs by name."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import tomli_w

from rankfit.client.worker_registry import WorkerDir
from rankfit.configs.compose import compose
from rankfit.configs.settings import RunSettings, to_flat
from tests.processes.deployment import (
    CONNECTION,
    MARK,
    ROOT,
    Deployment,
    Process,
    command,
    deployment,
    marked,
)

#: Two nodes, two ranks, a few seconds of training.
SMALL = (
    "run.rounds=2",
    "simulation.clients=2",
    "server.clients-per-round=2",
    "server.min-clients=2",
    "partition.kind=iid",
)
#: Memory that the nodes declare, in turn.
MEMORY_MIB = (5.98, 16)


@dataclass(frozen=True)
class Federation:
    """A deployment with SuperNodes, and where their workers listen and log."""

    deployment: Deployment
    runtime: Path
    nodes: tuple[Process, ...]

    def settings(self, name: str, *overrides: str) -> RunSettings:
        """Settings of a small quickstart."""
        place = (f"run.name={name}", f"run.directory={self.folder / 'runs'}")
        return compose(["quickstart", *SMALL, *place, *overrides])

    def config(self, name: str, *overrides: str) -> Path:
        """Write the run config of a small quickstart."""
        path = self.folder / f"{name}.toml"
        settings = self.settings(name, *overrides)
        path.write_text(tomli_w.dumps(dict(to_flat(settings))), encoding="utf-8")
        return path

    @property
    def folder(self) -> Path:
        """Folder of the deployment."""
        return self.deployment.folder

    def submit(self, config: Path) -> int:
        """Submit a run and return at once with its id."""
        done = self.deployment.flwr("run", str(ROOT), CONNECTION, "--run-config", str(config))
        started = re.search(r"Successfully started run (\d+)", done.stdout)
        assert started is not None, done.stdout + done.stderr
        return int(started.group(1))

    def workers(self) -> list[psutil.Process]:
        """The living workers."""
        alive = marked(self.deployment.environment[MARK])
        return [process for process in alive if _is_worker(process)]

    def sockets(self) -> list[Path]:
        """What workers have in the runtime folder: nothing when all have ended."""
        base = self.runtime / "rankfit"
        found = base.iterdir() if base.is_dir() else ()
        return sorted(path for path in found if not path.name.startswith("."))

    def logs(self) -> list[Path]:
        """Logs of all workers, oldest first."""
        folder = Path(self.deployment.environment["FLWR_HOME"]) / "rankfit"
        return sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)

    def log_of(self, worker: psutil.Process) -> Path:
        """Log of a living worker."""
        for folder in self.sockets():
            place = WorkerDir(folder)
            process = place.process()
            if process is not None and process.pid == worker.pid:
                return place.read().log
        raise LookupError(f"no folder in {self.runtime} is that of process {worker.pid}")

    def rankfit(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the ``rankfit`` command as the SuperNodes' user."""
        return subprocess.run(
            [command("rankfit"), *arguments],
            env=dict(self.deployment.environment),
            capture_output=True,
            text=True,
            timeout=180,
        )


@contextmanager
def federation(
    folder: Path,
    nodes: int,
    environment: Mapping[str, str] | None = None,
    memory_mib: Sequence[float] = MEMORY_MIB,
) -> Iterator[Federation]:
    """Start a SuperLink and ``nodes`` SuperNodes with partitions; all ends with the block.

    They declare ``memory_mib`` in turn; () = they are measured.
    """
    # Short, because a socket's path has at most 108 bytes.
    runtime = Path(tempfile.mkdtemp(prefix="rf-"))
    own = {"XDG_RUNTIME_DIR": str(runtime), **(environment or {})}
    try:
        with deployment(folder, own) as running:
            started = []
            for index in range(nodes):
                running.register(f"node-{index}")
                config = f"partition-id={index} num-partitions={nodes}"
                if memory_mib:
                    config += f" memory-mib={memory_mib[index % len(memory_mib)]}"
                started.append(running.start_supernode(f"node-{index}", config))
            running.wait_online(nodes)
            yield Federation(running, runtime, tuple(started))
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("rankfit.client.worker_process" in part for part in process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
