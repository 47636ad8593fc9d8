"""Real workers without Flower: a sleeping process stands for the SuperNode."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

from rankfit.adapters.adapter import Adapter, initial
from rankfit.adapters.wire import encode
from rankfit.client.worker_protocol import Request
from rankfit.client.worker_registry import ProcessHandle, WorkerDir, WorkerSpec, stop, worker_dirs
from rankfit.configs.compose import compose
from rankfit.configs.protocol import Instruction
from rankfit.configs.settings import RunSettings
from rankfit.estimator.plan import Plan
from rankfit.tasks.base_model import fingerprint, head_modules, load_base, target_modules
from rankfit.tasks.targets import head_tensors, target_shapes

#: Digits and the small ViT; one client has half of the data.
SETTINGS = ("quickstart", "partition.kind=iid", "lora.rank=12")


def settings(*overrides: str) -> RunSettings:
    return compose([*SETTINGS, *overrides])


@dataclass(frozen=True)
class Node:
    """A stand-in for a SuperNode."""

    process: "subprocess.Popen[bytes]"

    def spec(self, *overrides: str, run_id: int = 1) -> WorkerSpec:
        return WorkerSpec(run_id, 7, ProcessHandle.of(self.process.pid), settings(*overrides), None)


@contextmanager
def node() -> Iterator[Node]:
    """Start a stand-in; it and all workers end with the block."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
    try:
        yield Node(process)
    finally:
        for place in worker_dirs():
            stop(place, grace=3.0)
        process.kill()
        process.wait()


@lru_cache(maxsize=1)
def start() -> tuple[Adapter, str]:
    """The quickstart's global adapter, and the fingerprint of its base."""
    config = settings()
    base = load_base(config, 10)
    heads = head_modules(base)
    shapes = target_shapes(base, target_modules(base, config.lora.targets), config.lora.rank)
    adapter = initial(
        shapes, config.lora.rank, config.lora.scale, head_tensors(base, heads), seed=0
    )
    return adapter, fingerprint(base, heads=heads)


def train(rank: int = 4, number: int = 1, partition: int = 0) -> Request:
    """What the server sends to a client of two at this rank."""
    adapter, base = start()
    plan = Plan(dict.fromkeys(adapter.ranks, rank), "both", 32, 1, False, 0, 0, "cap")
    given = adapter.cut(plan.ranks)
    asked = Instruction(
        number, "one", f"partition-{partition}", adapter.scale, base, "fp32", plan.to_dict()
    )
    return Request("train", asked, encode(given.state_dict(), "float32"), partition, 2)


def evaluate(partition: int = 0) -> Request:
    """What the server sends to have the global adapter measured."""
    adapter, base = start()
    asked = Instruction(1, "one", f"partition-{partition}", adapter.scale, base, "fp32")
    return Request("evaluate", asked, encode(adapter.state_dict(), "float32"), partition, 2)


def the_place() -> WorkerDir:
    """Folder of the only worker."""
    (place,) = worker_dirs()
    return place


def next_place() -> WorkerDir:
    """Folder of the worker that another thread is starting."""
    wait_for(lambda: any(place.process() for place in worker_dirs()), "a worker is there")
    return the_place()


def log_text(place: WorkerDir) -> str:
    return place.read().log.read_text(encoding="utf-8")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.05)


def process_of(place: WorkerDir) -> psutil.Process:
    process = place.process()
    assert process is not None
    return psutil.Process(process.pid)


def runs(process: psutil.Process) -> bool:
    """Whether it runs; a zombie, which waits for this process to read its end, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(process: psutil.Process, folder: Path) -> bool:
    """Whether neither the process nor anything of its folder is left."""
    return not runs(process) and not folder.exists()
