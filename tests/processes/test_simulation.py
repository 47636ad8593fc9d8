"""The ``rankfit`` command on Flower's real simulation engine (Ray), with its own SuperLink."""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankfit.cli.flower import end_marked, marked
from rankfit.configs.compose import compose
from rankfit.server.loop import federate
from tests.processes.deployment import ENVIRONMENT, command
from tests.server.federation import FaultyGrid
from tests.server.test_loop import figures, lines

pytestmark = pytest.mark.processes

MARK = "RANKFIT_TEST_SIMULATION"
ROUNDS = 12
SMALL = (
    "quickstart", "simulation.clients=4", "server.clients-per-round=3", "server.min-clients=4",
)  # fmt: skip


@pytest.fixture()
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of one command; whatever it leaves running is ended by id."""
    own = {**os.environ, **ENVIRONMENT, MARK: str(tmp_path)}
    yield own
    end_marked(MARK, str(tmp_path), 5.0)


def rankfit(environment: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [command("rankfit"), *arguments],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_a_killed_simulation_resumes_with_the_figures_of_one_left_alone(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    # Enough rounds that the run is under way for seconds when it is killed after the second one.
    place = (f"run.directory={tmp_path}", f"run.rounds={ROUNDS}")
    whole = compose([*SMALL, *place, "run.name=whole"])
    federate(FaultyGrid(whole, {}), whole)

    cut = subprocess.Popen(
        [command("rankfit"), "run", *SMALL, *place, "run.name=cut"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rounds = tmp_path / "cut" / "rounds.jsonl"
    _wait_for(lambda: rounds.exists() and len(rounds.read_text().splitlines()) >= 3, cut)
    kill_all(tmp_path)
    cut.wait(120)
    assert lines(tmp_path / "cut")[-1]["round"] < ROUNDS, "it was killed before its end"

    resumed = rankfit(environment, "resume", str(tmp_path / "cut"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "PEFT adapter:" in resumed.stdout
    assert not marked(MARK, str(tmp_path)), "the command leaves no process behind"
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_a_run_that_fails_in_the_server_exits_non_zero_and_says_why(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    failed = rankfit(  # every loss is NaN from the second step on
        environment,
        "run",
        *SMALL,
        f"run.directory={tmp_path}",
        "run.rounds=1",
        "train.learning-rate=1e30",
    )
    assert failed.returncode == 1
    assert "not one update was merged" in failed.stdout
    assert "finished:failed" in failed.stderr


def kill_all(folder: Path) -> None:
    """SIGKILL every process of a command at once, as a power cut does."""
    for process in marked(MARK, str(folder)):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _wait_for(ready: Any, process: "subprocess.Popen[bytes]", seconds: float = 480.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the run ended before it was to be killed"
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.05)


def test_the_run_config_works_with_flwr_run_alone(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """Without the command: the file that it would write, given to ``flwr run`` on its SuperLink."""
    from rankfit.cli.flower import app_directory, federation_config, local_superlink
    from rankfit.configs.settings import to_flat

    settings = compose([*SMALL, f"run.directory={tmp_path}", "run.rounds=1"])
    file = tmp_path / "run.toml"
    import tomli_w

    file.write_text(tomli_w.dumps(dict(to_flat(settings))))
    with app_directory() as app, local_superlink(environment) as own:
        subprocess.run(
            [
                command("flwr"), "run", str(app), "--run-config", str(file), "--stream",
                "--federation-config", federation_config(settings),
            ],
            env=own, timeout=900, check=True, capture_output=True,
        )  # fmt: skip
    assert (
        json.loads((tmp_path / "quickstart" / "rounds.jsonl").read_text().splitlines()[-1])[
            "updates"
        ]
        == 3
    )
