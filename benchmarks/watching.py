"""What a deployment's processes do and when, seen from outside: their logs, memory and life."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rankfit.client.worker_registry import WorkerDir
from tests.processes.workers import Federation

#: Names of processes by what their command line holds.
_KINDS = {
    "rankfit.client.worker_process": "worker",
    "flwr-clientapp": "worker proxy",
    "flower-superexec": "SuperExec",
    "flower-supernode": "SuperNode",
}


@dataclass
class Seen:
    """One process: its kind, its node ("" = a worker), when it began, the most that it held."""

    kind: str
    node: str
    created: float
    rss_bytes: int = 0
    pss_bytes: int = 0


@dataclass(frozen=True)
class Line:
    """A line of a log and when it was first seen (seconds since the epoch)."""

    time: float
    source: str
    text: str


class Watch:
    """Reads logs and processes ten times a second, in a thread, until it is told to stop.

    Parameters
    ----------
    federation : Federation
        Whose SuperNodes are watched.
    rounds : Path
        The run's ``rounds.jsonl``, which gets a line at the end of every round.
    """

    def __init__(self, federation: Federation, rounds: Path) -> None:
        self.federation, self.rounds = federation, rounds
        self.seen: dict[int, Seen] = {}
        self.lines: list[Line] = []
        self._read = {node.log: node.log.stat().st_size for node in federation.nodes}
        self._offset = _clock_offset()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def finish(self) -> None:
        """Look a last time and end."""
        self._over.set()
        self._thread.join()
        self._look_at_logs()

    def _look(self) -> None:
        ticks = 0
        while not self._over.wait(0.1):
            self._look_at_logs()
            if ticks % 3 == 0:
                self._look_at_processes()
            ticks += 1

    def _look_at_logs(self) -> None:
        now = time.time()
        for path in [*(node.log for node in self.federation.nodes), self.rounds]:
            if not path.is_file():
                continue
            with path.open(errors="replace") as file:
                file.seek(self._read.get(path, 0))
                whole, newline, _ = file.read().rpartition("\n")
            self._read[path] = self._read.get(path, 0) + len((whole + newline).encode())
            for text in whole.splitlines():
                self.lines.append(Line(now, path.stem, text))

    def _look_at_processes(self) -> None:
        for node, process in self._processes():
            try:
                with process.oneshot():
                    seen = self.seen.get(process.pid) or self._first_look(node, process)
                    if seen is None:
                        continue
                    self.seen[process.pid] = seen
                    memory = process.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            seen.rss_bytes = max(seen.rss_bytes, memory.rss)
            seen.pss_bytes = max(seen.pss_bytes, memory.pss)

    def _first_look(self, node: str, process: psutil.Process) -> Seen | None:
        line = " ".join(process.cmdline())
        for part, kind in _KINDS.items():
            if part in line:
                return Seen(kind, node, process.create_time() + self._offset)
        return None

    def _processes(self) -> Iterator[tuple[str, psutil.Process]]:
        for node in self.federation.nodes:
            try:
                root = psutil.Process(node.popen.pid)
                for process in [root, *root.children(recursive=True)]:
                    yield node.name, process
            except psutil.NoSuchProcess:
                continue
        for folder in self.federation.sockets():
            worker = WorkerDir(folder).process()
            with suppress(psutil.NoSuchProcess):
                if worker is not None:
                    yield "", psutil.Process(worker.pid)


def _clock_offset() -> float:
    """Seconds by which the kernel's start times lag behind the clock (it counts from boot)."""
    now = time.time()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return now - psutil.Process(process.pid).create_time()


@dataclass(frozen=True)
class Hop:
    """One training message on one node, in seconds of each part of its way."""

    node: str
    round: int
    parts: dict[str, float]


#: Parts of a round in the order of time; ``training`` is what the client measured.
PARTS = (
    "server opens the round, SuperNode's poll finds the message",
    "SuperExec's poll finds the task, starts flwr-clientapp",
    "flwr-clientapp: Python and Flower start",
    "flwr-clientapp: all but the training; SuperNode's poll finds the answer",
    "training",
    "SuperNode sends the answer",
    "server's poll finds the answer; merge, evaluation, checkpoint",
)


def hops(watch: Watch, training: dict[tuple[str, int], float]) -> list[Hop]:
    """Take the messages of all rounds but the first apart.

    Parameters
    ----------
    watch : Watch
        Of a run that is over.
    training : dict
        Seconds that the clients say they trained, by node and round.
    """
    ends = [line.time for line in watch.lines if line.source == watch.rounds.stem]
    found = []
    for node in watch.federation.nodes:
        for number, times in _messages(watch, node.name).items():
            # The SuperExec may start it while the SuperNode still fetches the message's arrays.
            created = _created(watch, node.name, times["Receiving"], times["Start"])
            if number < 2 or number >= len(ends) or created is None:
                continue
            trained = training[(node.name, number)]
            seconds = (
                times["Receiving"] - ends[number - 1],
                created - times["Receiving"],
                times["Start"] - created,
                times["Sending"] - times["Start"] - trained,
                trained,
                times["Sent"] - times["Sending"],
                ends[number] - times["Sent"],
            )
            found.append(Hop(node.name, number, dict(zip(PARTS, seconds, strict=True))))
    return found


def _messages(watch: Watch, node: str) -> dict[int, dict[str, float]]:
    """Times of the SuperNode's lines about each round's training message."""
    found: dict[int, dict[str, float]] = {}
    number, training = 0, False
    for line in watch.lines:
        if line.source != node:
            continue
        if heading := re.search(r"ROUND (\d+)\]", line.text):
            number = int(heading.group(1))
        if word := re.search(r"(Receiving|Sending): (\S+) message", line.text):
            training = word.group(2) == "train"
        step = re.search(r"(Receiving|Received|WorkerStart|Sending|Sent)\b", line.text)
        if training and step:
            found.setdefault(number, {})[step.group(1)] = line.time
    return {number: times for number, times in found.items() if len(times) == 5}


def _created(watch: Watch, node: str, after: float, before: float) -> float | None:
    """When the message's process was created."""
    mine = [s for s in watch.seen.values() if s.kind == "worker proxy" and s.node == node]
    times = [s.created for s in mine]
    inside = [moment for moment in times if after - 0.2 <= moment <= before + 0.2]
    return min(inside) if inside else None
