"""What becomes of a run directory when its process, its disk or its files fail."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from rankfit.adapters.adapter import Adapter, initial
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.server import lock
from rankfit.server.run_directory import (
    STATE,
    SUMS,
    TENSORS,
    WEIGHTS,
    Checkpoint,
    RunDirectory,
    SavedRun,
    StorageError,
    damage,
    kept_rounds,
)

SHAPES = {"block.query": (16, 16)}


@cache
def settings_for(folder: Path, resume: bool = False) -> RunSettings:
    place = [f"run.directory={folder}", "run.name=r", f"run.resume={str(resume).lower()}"]
    return compose(["quickstart", *place])


def resumed(folder: Path) -> RunDirectory:
    return RunDirectory(settings_for(folder, resume=True))


def adapter_of(number: int) -> Adapter:
    return initial(SHAPES, 2, 1.0, {"head.weight": torch.full((4, 16), float(number))}, seed=number)


def write_round(directory: RunDirectory, number: int) -> None:
    directory.append_round({"round": number, "updates": 1})
    average = adapter_of(number + 1)
    tensors = {"moment": torch.full((8,), float(number))}
    directory.save(
        Checkpoint(number, adapter_of(number), {"identity": "x"}, tensors, average), ["head"]
    )


def begun(folder: Path, rounds: int = 0) -> RunDirectory:
    directory = RunDirectory(settings_for(folder))
    directory.create()
    for number in range(rounds + 1):
        write_round(directory, number)
    return directory


def check_goes_on(folder: Path, at_least: int) -> int:
    """Resume, and return the round that the run goes on after."""
    directory = resumed(folder)
    try:
        checkpoint = directory.open()
        assert checkpoint is not None and checkpoint.round >= at_least
        same = adapter_of(checkpoint.round).state_dict()
        for name, tensor in checkpoint.adapter.state_dict().items():
            assert torch.equal(tensor, same[name])
        assert [line["round"] for line in directory.rounds()] == list(range(checkpoint.round + 1))
        assert (folder / "r" / "checkpoint").resolve().name == f"round-{checkpoint.round:05d}"
        return checkpoint.round
    finally:
        directory.close()


def in_a_process(work: Callable[[int], None]) -> tuple[int, int]:
    """Run ``work`` with a pipe to write to in a process of its own: (process, end to read from)."""
    end, start = os.pipe()
    process = os.fork()
    if process:
        os.close(start)
        return process, end
    status = 1
    try:
        os.close(end)
        work(start)
        status = 0
    finally:
        os._exit(status)


def last_line(end: int, default: int, before: bytes = b"") -> int:
    with os.fdopen(end, "rb") as read:
        lines = (before + read.read()).split(b"\n")
    return int(lines[-2]) if len(lines) > 1 else default


def test_kill_at_a_hundred_instants_loses_no_finished_round(tmp_path: Path) -> None:
    directory = begun(tmp_path)
    began = time.monotonic()
    write_round(directory, 1)
    span = 2 * (time.monotonic() - began)
    directory.close()
    done, draw = 1, random.Random(1)
    resumed(tmp_path)  # composed once, for all processes

    def write(start: int) -> None:
        directory = resumed(tmp_path)
        checkpoint = directory.open()
        assert checkpoint is not None
        directory.create()
        os.write(start, b"%d\n" % checkpoint.round)
        for number in range(checkpoint.round + 1, checkpoint.round + 1000):
            write_round(directory, number)
            os.write(start, b"%d\n" % number)

    for _ in range(100):
        process, end = in_a_process(write)
        first = os.read(end, 2**16)  # it has begun to write
        time.sleep(draw.uniform(0.0, span))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        before, done = done, check_goes_on(tmp_path, last_line(end, done, first))
        # Instants within the writing of a round or two, however slow and busy the machine is.
        span *= 0.8 if done > before + 1 else 1.25 if done == before else 1.0
    assert done > 20 and SavedRun.open(tmp_path / "r").round == done


def test_a_full_disk_at_thirty_sizes_loses_no_finished_round(tmp_path: Path) -> None:
    """The kernel refuses what a file is to hold beyond so many bytes."""
    begun(tmp_path, 2).close()
    whole = max(f.stat().st_size for f in (tmp_path / "r").rglob("*") if f.is_file())
    outcomes = set()
    for size in [whole * step // 28 for step in range(30)]:

        def write(start: int, size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                directory = resumed(tmp_path)
                checkpoint = directory.open()
                assert checkpoint is not None
                directory.create()
                write_round(directory, checkpoint.round + 1)
                os.write(start, b"1\n")
            except StorageError as error:
                os.write(start, b"2\n" if "No finished round is lost" in str(error) else b"3\n")
            except OSError:  # not even the lock could be written
                os.write(start, b"4\n")

        done = check_goes_on(tmp_path, 2)
        process, end = in_a_process(write)
        os.waitpid(process, 0)
        outcome = last_line(end, 5)
        outcomes.add(outcome)
        assert outcome in (1, 2, 4), size
        assert check_goes_on(tmp_path, done + (outcome == 1)) == done + (outcome == 1)
    assert {1, 2} <= outcomes


def test_a_second_writer_is_refused_and_told_who_the_first_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(tmp_path, 1).close()

    def hold(start: int) -> None:
        resumed(tmp_path).open()
        os.write(start, b"1\n")
        time.sleep(60)

    process, end = in_a_process(hold)
    assert os.read(end, 2) == b"1\n"
    before = (tmp_path / "r" / "rounds.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=rf"being written by process {process} of .* since 2"):
        resumed(tmp_path).open()
    assert (tmp_path / "r" / "rounds.jsonl").read_bytes() == before
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(end)
    logging.getLogger("rankfit").propagate = True
    check_goes_on(tmp_path, 1)
    assert f"a stale lock is taken over, of process {process}" in caplog.text
    caplog.clear()
    check_goes_on(tmp_path, 1)  # a lock that was given back is not stale
    assert "stale" not in caplog.text


def test_a_lock_of_another_host_counts_while_it_is_renewed(tmp_path: Path) -> None:
    begun(tmp_path, 1).close()
    file = tmp_path / "r" / lock.NAME
    file.write_text(json.dumps({"owner": "o", "host": "elsewhere", "process": 1, "since": "now"}))
    with pytest.raises(ConfigError, match="process 1 of o on elsewhere since now"):
        resumed(tmp_path).open()
    os.utime(file, (0, time.time() - lock.STALE_SECONDS - 1))
    check_goes_on(tmp_path, 1)
    file.write_text("{damaged")
    os.utime(file, (0, 0))
    check_goes_on(tmp_path, 1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {"flip": flip, "cut": cut, "empty": lambda f: f.write_bytes(b""), "gone": Path.unlink}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [WEIGHTS, STATE, SUMS, TENSORS, "adapter_config.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    begun(tmp_path, 3).close()
    logging.getLogger("rankfit").propagate = True
    newest, older = kept_rounds(tmp_path / "r")
    assert not damage(newest) and not damage(older)
    DAMAGE[how](newest / name)
    assert check_goes_on(tmp_path, 2) == 2
    assert f"{newest} is damaged" in caplog.text and "going back" in caplog.text
    # The next round of that number is written as if nothing had been.
    directory = resumed(tmp_path)
    directory.open()
    write_round(directory, 3)
    directory.close()
    assert check_goes_on(tmp_path, 3) == 3


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(tmp_path: Path) -> None:
    begun(tmp_path, 3).close()
    for folder in kept_rounds(tmp_path / "r"):
        flip(folder / WEIGHTS)
    before = (tmp_path / "r" / "rounds.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigError, match="3 rounds are done, and no whole checkpoint is left"):
            resumed(tmp_path).open()
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        SavedRun.open(tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    with pytest.raises(ConfigError, match="3 rounds are done"):
        resumed(tmp_path).open()
    assert (tmp_path / "r" / "rounds.jsonl").read_bytes() == before


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("rankfit").propagate = True
    directory = RunDirectory(settings_for(tmp_path))
    directory.create()
    directory.append_round({"round": 0})
    directory.close()
    again = resumed(tmp_path)
    assert again.open() is None and again.rounds() == []
    again.close()
    assert "no round was done" in caplog.text


def test_a_missing_or_wrong_link_and_an_older_release(tmp_path: Path) -> None:
    begun(tmp_path, 2).close()
    link = tmp_path / "r" / "checkpoint"
    link.unlink()
    assert check_goes_on(tmp_path, 2) == 2
    link.unlink()
    link.symlink_to("checkpoints/round-00099")
    assert check_goes_on(tmp_path, 2) == 2
    newest = kept_rounds(tmp_path / "r")[0]
    state = json.loads((newest / STATE).read_text())
    del state["sums"]
    (newest / STATE).write_text(json.dumps(state))
    (newest / SUMS).unlink()
    assert check_goes_on(tmp_path, 2) == 2
    shutil.rmtree(newest)
    assert check_goes_on(tmp_path, 1) == 1


def test_rounds_beyond_99999_are_newer(tmp_path: Path) -> None:
    directory = begun(tmp_path)
    for number in (99_999, 100_000, 100_001):
        write_round(directory, number)
    directory.close()
    kept = [folder.name for folder in kept_rounds(tmp_path / "r")]
    assert kept == ["round-100001", "round-100000"]
    again = resumed(tmp_path)
    checkpoint = again.open()
    again.close()
    assert checkpoint is not None and checkpoint.round == 100_001


def test_two_new_runs_of_one_name_at_once(tmp_path: Path) -> None:
    one, other = RunDirectory(settings_for(tmp_path)), RunDirectory(settings_for(tmp_path))
    one.create()
    with pytest.raises(ConfigError, match="being written"):
        other.create()
    one.close()
    with pytest.raises(ConfigError, match="holds a run already"):
        other.create()
    other.close()
