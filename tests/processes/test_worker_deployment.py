"""The worker under a real SuperLink and SuperNodes: figures, and its end whatever ends."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from rankfit.server.loop import federate
from tests.processes.deployment import CONNECTION
from tests.processes.workers import MEMORY_MIB, Federation, federation
from tests.server.federation import FaultyGrid

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="needs openssl and ssh-keygen",
    ),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("warm") / "deployment", 2) as started:
        yield started


def rounds(running: Federation, name: str) -> list[dict[str, Any]]:
    path = running.folder / "runs" / name / "rounds.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(running: Federation, name: str, until: int = 99) -> dict[str, object]:
    """All figures of a run's rounds but its times, by their path in the lines."""

    def flat(value: object, path: str) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict):
            for key, item in value.items():
                if key not in ("seconds", "train-seconds"):
                    yield from flat(item, f"{path}.{key}")
        else:
            yield path, value

    lines = [line for line in rounds(running, name) if line["round"] <= until]
    return dict(pair for line in lines for pair in flat(line, str(line["round"])))


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.1)


def train_begins(running: Federation, worker: psutil.Process, number: int) -> bool:
    try:
        return f"train of round {number}: begins" in running.log_of(worker).read_text()
    except (LookupError, OSError):
        return False  # it has not been written down yet which process it is


def test_figures_are_the_same_with_and_without_the_worker(running: Federation) -> None:
    # At the same time: two runs on the same SuperNodes do not disturb each other either.
    warm = running.submit(running.config("warm"))
    cold = running.submit(running.config("cold", "client.warm=off", "run.rounds=1"))
    status = running.deployment.status
    ids = (warm, cold)
    wait_for(lambda: all(status(i).startswith("finished") for i in ids), "both end", 540.0)
    assert [status(run_id) for run_id in ids] == ["finished:completed"] * 2
    assert running.workers() == [] and running.sockets() == []

    # A deployment's nodes say themselves what they have; the preset's simulated ones count there.
    fleet = f"fleet.memory-mib={','.join(map(str, MEMORY_MIB))}"
    links = ("fleet.upload-mbps=", "fleet.download-mbps=")
    settings = running.settings("here", "client.warm=off", fleet, *links)
    federate(FaultyGrid(settings, {}), settings)
    assert [line["updates"] for line in rounds(running, "here")[1:]] == [2, 2]
    assert figures(running, "warm") == figures(running, "here")
    assert figures(running, "cold") == figures(running, "here", until=1)
    texts = [log.read_text() for log in running.logs()]
    assert len(texts) == 2  # one worker for each node, none for the run without
    for text in texts:
        assert text.count("base model builtin:font-vit loaded") == 1, text
        assert "its run is over" in text


def test_every_end_leaves_nothing_behind(running: Federation) -> None:
    config = running.config(
        "ends", "run.rounds=50", "train.epochs=30", "client.idle-seconds=30", "server.min-clients=1"
    )
    run_id = running.submit(config)

    # One worker is killed while it trains: its update is lost, and the round goes on.
    wait_for(lambda: len(running.workers()) == 2, "two workers")
    victim = running.workers()[0]
    wait_for(lambda: train_begins(running, victim, 1), "it trains")
    log_file = running.log_of(victim)
    victim.kill()
    wait_for(lambda: len(rounds(running, "ends")) > 1, "round 1 is done")
    reasons = [c.get("reason", "") for c in rounds(running, "ends")[1]["clients"].values()]
    assert sorted(map(bool, reasons)) == [False, True]
    (reason,) = filter(None, reasons)
    assert "its worker died" in reason and str(log_file) not in reason  # the place is the node's

    # The next message starts another, and the other worker is still the first.
    wait_for(lambda: len(running.workers()) == 2, "it is replaced")
    assert len(running.sockets()) == 2

    # A SuperNode is killed: its worker goes with it, the other stays.
    node = running.nodes[1]
    family = psutil.Process(node.popen.pid).children(recursive=True)
    before = set(running.workers())
    node.popen.kill()
    node.popen.wait()
    wait_for(lambda: len(running.workers()) == 1, "its worker is gone", 60.0)
    wait_for(lambda: len(running.sockets()) == 1, "with its folder", 60.0)
    wait_for(lambda: not any(map(_runs, family)), "and all that it had started", 60.0)
    assert set(running.workers()) < before

    # The run is stopped; Flower tells the node nothing, so the worker waits, and then ends.
    (left,) = running.workers()
    log_file = running.log_of(left)
    stopped = running.deployment.flwr("stop", str(run_id), CONNECTION)
    assert stopped.returncode == 0, stopped.stdout
    wait_for(lambda: running.workers() == [], "no worker is left", 240.0)
    assert running.sockets() == []
    assert "no message for 30 s" in log_file.read_text()


def test_workers_stop_when_asked(running: Federation) -> None:
    config = running.config("asked", "run.rounds=50", "server.min-clients=1")
    run_id = running.submit(config)
    wait_for(lambda: len(running.workers()) > 0, "a worker")
    assert "alive" in running.rankfit("node").stdout
    running.deployment.flwr("stop", str(run_id), CONNECTION)
    done = running.rankfit("node", "--stop-workers")
    assert re.search(r"stopped \d+ worker", done.stdout), done.stdout + done.stderr

    def none_left() -> bool:
        """A message that had reached its node can still start a worker."""
        running.rankfit("node", "--stop-workers")
        return running.workers() == [] and running.sockets() == []

    wait_for(none_left, "nothing is left")


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
