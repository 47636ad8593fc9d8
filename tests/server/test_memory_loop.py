"""Runs in which devices lose memory between rounds, or take more of it than was estimated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord

from rankfit.client import trainer
from rankfit.configs.settings import RunSettings
from rankfit.estimator.tracer import TraceCache
from rankfit.server import loop
from rankfit.server.loop import federate
from rankfit.server.run_directory import RunDirectory
from tests.server.federation import FaultyGrid, settings_for

MIB = 2**20
BOTH, CUT = ("partition-0", "partition-1"), "partition-1"
TWO = (
    "simulation.clients=2",
    "train.steps=2",
    "server.evaluate=none",
    "server.clients-per-round=2",
    "server.min-clients=2",
    'fleet.memory-mib="16"',
    'fleet.upload-mbps="20"',
    'fleet.download-mbps="50"',
)
#: MiB in which the least ranks fit at the whole batch.
LITTLE = 5.98
#: All runs here train one model: it is traced once.
TRACES = TraceCache()
#: Free MiB of a client in a round.
Free = Callable[[str, int], float]


class Devices(FaultyGrid):
    """Two clients whose devices report, and hold, the free memory that a test gives them."""

    def __init__(self, settings: RunSettings, free: Free) -> None:
        super().__init__(settings, {})
        self.free = free
        self.queries: list[tuple[int, str]] = []

    def _handle(self, message: Message) -> Message:
        reply = super()._handle(message)
        if message.metadata.message_type == "query.capabilities":
            record = cast(ConfigRecord, reply.content["device"])
            client, number = str(record["client"]), int(message.metadata.group_id)
            self.queries.append((number, client))
            # As a device reports whose memory is measured, not declared.
            record["source"], record["note"] = "ram", ""
            record["free-bytes"] = int(self.free(client, number) * MIB)
        return reply


def lines(folder: Path, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def outcomes(folder: Path, client: str) -> list[dict[str, Any]]:
    return [line["clients"].get(client) for line in lines(folder)[1:]]


def plans(folder: Path, client: str) -> dict[int, dict[str, Any]]:
    """Plans of a client by the round from which they held."""
    listed = lines(folder, "plans.jsonl")
    return {p["round"]: p["plan"] for p in listed if p["client"] == client}


@pytest.fixture(autouse=True)
def shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "TraceCache", lambda: TRACES)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run two clients; the trainer keeps to what the device has at that moment."""

    def play(free: Free, *overrides: str, held: Free | None = None) -> tuple[Path, Devices]:
        train, has = trainer.train, held or free

        def within(workspace: Any, job: trainer.Job) -> trainer.Trained:
            cap = int(has(job.client, job.round) * MIB)
            return train(workspace, trainer.replace(job, cap_bytes=cap))

        monkeypatch.setattr(trainer, "train", within)
        settings = settings_for(tmp_path, "two", *TWO, *overrides)
        grid = Devices(settings, free)
        federate(grid, settings)
        return tmp_path / "two", grid

    return play


def test_a_device_whose_free_memory_is_cut_gets_a_smaller_plan_and_is_not_lost(play: Any) -> None:
    folder, grid = play(lambda client, number: LITTLE if client == CUT and number > 1 else 16.0)
    own, other = plans(folder, CUT), plans(folder, BOTH[0])
    assert list(own) == [1, 2] and list(other) == [1], "one new plan, when the memory was cut"
    assert own[1]["peak-bytes"] > LITTLE * MIB >= own[2]["peak-bytes"]
    assert own[1]["binding"] == "cap" and own[2]["binding"] == "memory"
    assert max(own[2]["ranks"]) < max(own[1]["ranks"])
    assert own[2]["micro-batch"] == own[1]["micro-batch"]
    for client in BOTH:
        trained = outcomes(folder, client)
        assert len(trained) == 3 and all(o["merged"] for o in trained)
        assert not any("out-of-memory" in o for o in trained), "planned for, not run into"
    assert outcomes(folder, CUT)[1]["peak-memory-bytes"] <= LITTLE * MIB
    assert [c for n, c in grid.queries if n == 2] == list(BOTH), "asked once in every round"


def test_memory_that_comes_back_gives_the_rank_back(play: Any) -> None:
    folder, _ = play(lambda client, number: LITTLE if client == CUT and number == 2 else 16.0)
    own = plans(folder, CUT)
    assert list(own) == [1, 2, 3] and own[3] == own[1]


def test_a_run_may_read_free_memory_once(play: Any) -> None:
    folder, grid = play(
        lambda client, number: LITTLE if client == CUT and number > 1 else 16.0,
        "plan.read-memory=once",
        held=lambda client, number: 16.0,
    )
    assert list(plans(folder, CUT)) == [1] and {n for n, _ in grid.queries} == {0}


def test_free_memory_that_flickers_without_effect_makes_no_new_plan(play: Any) -> None:
    folder, _ = play(lambda client, number: 16.0 - number / 1000)
    assert list(plans(folder, CUT)) == [1]


def test_a_device_without_room_sits_out_a_round_and_comes_back(play: Any) -> None:
    free = {2: 0.5}
    folder, _ = play(lambda client, number: free.get(number, 16.0) if client == CUT else 16.0,
                     "server.min-clients=1")  # fmt: skip
    assert [bool(outcome) for outcome in outcomes(folder, CUT)] == [True, False, True]
    assert all(o["merged"] for o in outcomes(folder, BOTH[0]))


def test_a_round_waits_where_nobody_has_room(play: Any) -> None:
    """Both devices are full when round 2 begins, and are free again two queries later."""
    asked = dict.fromkeys(BOTH, 0)

    def free(client: str, number: int) -> float:
        asked[client] += number == 2
        return 0.5 if number == 2 and asked[client] <= 2 else 16.0

    folder, _ = play(free, held=lambda client, number: 16.0)
    assert all(o["merged"] for client in BOTH for o in outcomes(folder, client))
    assert len(lines(folder)) == 4 and min(asked.values()) >= 3


def test_out_of_memory_falls_back_within_the_round_and_lowers_the_next_plan(play: Any) -> None:
    """Memory is taken after the query, every time: only the client's report can tell."""
    folder, _ = play(
        lambda client, number: 16.0,
        held=lambda client, number: LITTLE if client == CUT else 16.0,
    )
    first, second, third = outcomes(folder, CUT)
    assert first["merged"] and first["out-of-memory"] >= 1
    assert all(o["merged"] for o in (second, third)) and "out-of-memory" not in third
    assert all(o["merged"] and "out-of-memory" not in o for o in outcomes(folder, BOTH[0]))
    own = plans(folder, CUT)
    assert own[2]["peak-bytes"] <= 0.95 * own[1]["peak-bytes"]
    assert list(plans(folder, BOTH[0])) == [1]


def test_a_client_that_cannot_train_at_all_is_planned_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trainer.train

    def fails_once(workspace: Any, job: trainer.Job) -> trainer.Trained:
        if job.client == CUT and job.round == 1:
            raise trainer.torch.OutOfMemoryError("no room for anything")
        return train(workspace, job)

    monkeypatch.setattr(trainer, "train", fails_once)
    settings = settings_for(tmp_path, "two", *TWO)
    federate(FaultyGrid(settings, {}), settings)
    first, second, _ = outcomes(tmp_path / "two", CUT)
    assert not first["merged"] and "no room for anything" in first["reason"] and second["merged"]
    own = plans(tmp_path / "two", CUT)
    assert own[2]["peak-bytes"] <= 0.95 * own[1]["peak-bytes"]


def test_a_peak_above_the_estimate_is_kept_free_shown_and_survives_a_resume(
    tmp_path: Path,
) -> None:
    """Every update says that its device took 1 MiB more than was expected."""

    class Hungry(FaultyGrid):
        def _handle(self, message: Message) -> Message:
            reply = super()._handle(message)
            if message.metadata.message_type == "train":
                metrics = cast(MetricRecord, reply.content["metrics"])
                metrics["peak-memory-bytes"] = int(metrics["peak-memory-bytes"]) + MIB  # type: ignore[arg-type]
            return reply

    def settings(*overrides: str) -> RunSettings:
        memory = ('fleet.memory-mib="5.98"', *overrides)
        return settings_for(tmp_path, "hungry", *TWO, *memory)

    federate(Hungry(settings("run.rounds=2"), {}), settings("run.rounds=2"))
    folder = tmp_path / "hungry"
    first, second = (line["clients"][CUT] for line in lines(folder)[1:3])
    assert first["kept-free-bytes"] == second["kept-free-bytes"] > 0.99 * MIB
    assert first["peak-memory-bytes"] - first["expected-peak-bytes"] > 0.99 * MIB
    own = plans(folder, CUT)
    assert own[2]["peak-bytes"] + first["kept-free-bytes"] <= 5.98 * MIB
    report = (folder / "report.html").read_text()
    assert "kept free MiB" in report and "1.0" in report
    checkpoint = RunDirectory(settings("run.resume=true", "run.rounds=3")).load()
    assert checkpoint is not None
    learned = dict.fromkeys(BOTH, first["kept-free-bytes"])
    assert list(checkpoint.strategy["corrections"].values()) == [learned]
    resumed = settings("run.resume=true", "run.rounds=3")
    federate(FaultyGrid(resumed, {}), resumed)
    third = lines(folder)[3]["clients"][CUT]
    assert third["expected-peak-bytes"] == second["expected-peak-bytes"]
