"""Whole runs that are killed at a hundred instants, and disks that fill up at thirty sizes.

A run is killed (SIGKILL) after a random time, resumed and killed again: a round that it said was
done must be there when it resumes, with every line before it. Then it goes on writing on file
systems of thirty sizes, from too small for one more byte to large enough for some rounds; each is
enlarged afterwards, and the run must go on after the last round that it said was done. Small file
systems are tmpfs, mounted in a namespace of the benchmark's own (``unshare``, util-linux).

    unshare --user --map-root-user --mount python -m benchmarks.interruptions
"""

import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, write_record
from rankfit.client.app import app as client_app
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError, RunSettings, to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import federate
from rankfit.server.run_directory import RunDirectory, StorageError

RESULT = Path(__file__).parent / "results" / "interruptions.json"
CLIENTS = 3
#: How a process ended, by its exit status.
ENDINGS = {0: "went on", 3: "said that it cannot be written", 4: "refused to start", 5: "OSError"}


def settings_of(folder: Path, resume: bool, rounds: int) -> RunSettings:
    """A quickstart of three clients and one step of training each."""
    return compose(
        [
            "quickstart", f"run.directory={folder}", "run.name=r", f"run.rounds={rounds}",
            f"run.resume={str(resume).lower()}", f"simulation.clients={CLIENTS}",
            f"server.min-clients={CLIENTS}", f"server.clients-per-round={CLIENTS}",
            "partition.kind=iid", "train.steps=1", "server.diagnostics=false",
            "server.evaluate-every=1000", "plan.read-memory=once",
        ]
    )  # fmt: skip


class Said(logging.Handler):
    """Writes the number of each round that the run says is done to a pipe."""

    def __init__(self, end: int) -> None:
        super().__init__()
        self._end = end

    def emit(self, record: logging.LogRecord) -> None:
        """See the base class."""
        words = record.getMessage().split()
        if words[0] == "round":
            os.write(self._end, words[1].split("/")[0].encode() + b"\n")


def in_a_process(settings: RunSettings) -> tuple[int, int]:
    """Run in a process of its own: its id, and the pipe on which it says which rounds are done."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    status = 1
    try:
        os.close(read)
        logging.disable(logging.NOTSET)
        loop = logging.getLogger("rankfit.server.loop")
        loop.setLevel(logging.INFO)
        loop.addHandler(Said(write))
        nodes = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]
        with redirect_stdout(None):
            federate(InProcessGrid(client_app, to_flat(settings), nodes), settings)
        status = 0
    except StorageError:
        status = 3
    except ConfigError:
        status = 4
    except OSError:
        status = 5
    finally:
        os._exit(status)


def said(read: int) -> list[int]:
    """All rounds that a process that has ended said were done."""
    with os.fdopen(read, "rb") as pipe:
        return [int(line) for line in pipe.read().split(b"\n") if line.isdigit()]


def standing(folder: Path) -> int:
    """The round after which the run would go on.

    Raises
    ------
    AssertionError
        If a line of an earlier round is missing or there twice.
    """
    directory = RunDirectory(settings_of(folder, True, 10**6))
    try:
        checkpoint = directory.open()
        assert checkpoint is not None
        assert [line["round"] for line in directory.rounds()] == list(range(checkpoint.round + 1))
        return checkpoint.round
    finally:
        directory.close()


def kills(folder: Path, count: int) -> dict[str, Any]:
    """Kill a run ``count`` times; how far it came."""
    draw, done, lost = random.Random(0), 0, 0
    settings = settings_of(folder, True, 10**6)
    process, read = in_a_process(settings)
    began = time.monotonic()
    assert os.read(read, 1), "the run has ended by itself"
    start = time.monotonic() - began  # until the first round after a start is done
    os.read(read, 100)
    began = time.monotonic()
    assert os.read(read, 1), "the run has ended by itself"
    each = time.monotonic() - began
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(read)
    for number in range(count):
        process, read = in_a_process(settings)
        if number % 2:  # in the midst of rounds, however slow the machine is
            first = os.read(read, 100)
            assert first, "the run has ended by itself"
            done = max(done, *map(int, first.split()))
            time.sleep(each * draw.uniform(0.0, 2.0))
        else:  # while it starts, or in its first round
            time.sleep(start * draw.uniform(0.0, 1.2))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        done = max([done, *said(read)])
        now = standing(folder)
        lost += now < done
        done = max(done, now)
    assert not lost, f"{lost} of {count} kills lost a finished round"
    assert done > count // 2, f"{count} kills let {done} rounds be done: they come too early"
    return {"kills": count, "rounds": done, "finished-rounds-lost": lost}


def disks(folder: Path, whole: Path, count: int) -> dict[str, Any]:
    """Go on with a run on ``count`` small file systems; how it ended on each, and afterwards."""
    size = sum(4096 * (1 + f.stat().st_size // 4096) for f in whole.rglob("*") if f.is_file())
    endings, lost = Counter[str](), 0
    for step in range(count):
        room = size + 4096 * (1 + step) + step * size // (2 * count)
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], check=True)
        try:
            shutil.copytree(whole, folder / "r", symlinks=True)
            before = standing(folder)
            # A first write of nothing more than what is there, too.
            if step == 0:
                with contextlib.suppress(OSError), (folder / "filler").open("wb") as filler:
                    filler.write(b"\0" * room)
            process, read = in_a_process(settings_of(folder, True, before + 4))
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            assert status in ENDINGS, f"{room} bytes: exit status {status}"
            endings[ENDINGS[status]] += 1
            done = max([before, *said(read)])
            larger = f"remount,size={4 * size}"
            subprocess.run(["mount", "-o", larger, folder], check=True)
            process, read = in_a_process(settings_of(folder, True, before + 5))
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            rounds = said(read)
            lost += not (status == 0 and rounds[0] <= done + 1 and rounds[-1] == before + 5)
            lost += rounds[0] != done + 1 and rounds[0] != done + 2  # one may be done and unsaid
        finally:
            subprocess.run(["umount", folder], check=True)
            folder.rmdir()
    assert not lost, f"{lost} of {count} disks lost a finished round"
    return {"disks": count, "endings": dict(endings), "finished-rounds-lost": lost}


def main() -> None:
    """Interrupt, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--disks", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = settings_of(folder, False, 2)
        nodes = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]
        with redirect_stdout(None):  # here, so that the processes find all loaded and traced
            federate(InProcessGrid(client_app, to_flat(first), nodes), first)
        whole = folder / "whole"
        shutil.copytree(folder / "r", whole, symlinks=True)
        record = {
            "benchmark": "interruptions",
            **machine("torch", "flwr"),
            "killed": kills(folder, options.kills),
            "full": disks(folder / "disk", whole, options.disks),
        }
    print(record["killed"], record["full"], sep="\n")
    write_record(options.output, record)


if __name__ == "__main__":
    main()
