"""Each tracker holds the very figures of rounds.jsonl, and none of them can cost a run."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError
from rankfit.server.trackers import Trackers, figures
from tests.conftest import ROOT
from tests.server.federation import run, settings_for
from tests.server.test_loop import lines

Series = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    return run(settings_for(place, "plain", "run.rounds=2", "best.metric=loss"))


def wanted(folder: Path) -> Series:
    """What a tracker is to hold of a run, by name of the figure."""
    found: Series = {}
    for line in lines(folder):
        if line["round"]:
            for name, value in figures(line).items():
                found.setdefault(name, []).append((line["round"], value))
    return found


def tensorboard(folder: Path) -> Series:
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def assert_same(found: Series, expected: Series) -> None:
    """Equal to single precision, which is what TensorBoard stores."""
    assert found.keys() >= expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [value for _, value in points]
        assert [value for _, value in found[name]] == pytest.approx(values, rel=1e-6), name


def test_figures_are_of_the_round_and_of_each_client(folder: Path) -> None:
    line = lines(folder)[1]
    found = figures(line)
    assert found["evaluation/accuracy"] == line["evaluation"]["accuracy"]
    assert found["holdout/loss"] == line["holdout"]["loss"] and found["round/best"] == 1
    own = line["clients"]["partition-2"]
    for key in ("rank", "peak-memory-bytes", "train-seconds", "train-loss", "upload-bytes"):
        assert found[f"client/partition-2/{key}"] == own[key]
    assert all(isinstance(value, float) for value in found.values())


def test_tensorboard_holds_the_figures_and_the_settings(folder: Path) -> None:
    assert_same(tensorboard(folder), wanted(folder))
    (file,) = folder.glob("events/*/hparams.yml")
    text = file.read_text()
    assert "run.rounds: 2" in text
    assert str(folder.parent) not in text, "local paths do not leave the machine"


def test_a_resumed_run_replaces_what_tensorboard_had_of_later_rounds(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "plain", symlinks=True)
    shutil.rmtree(tmp_path / "plain" / "checkpoints" / "round-00002")
    own = ("run.rounds=3", "best.metric=loss", "run.resume=true")
    again = run(settings_for(tmp_path, "plain", *own))
    assert [line["round"] for line in lines(again)] == [0, 1, 2, 3]
    steps = [step for step, _ in tensorboard(again)["evaluation/accuracy"]]
    assert steps == [1, 2, 3]
    assert len(list(again.glob("events/*/hparams.yml"))) == 1


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("rankfit").propagate = True
    caplog.set_level(logging.WARNING, "rankfit.server.trackers")
    return caplog


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_a_tracker_that_fails_costs_one_line_and_no_run(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    def fail(self: object, *_: object, **__: object) -> None:
        raise OSError("no\nroute")

    monkeypatch.setattr(TensorBoardTracker, when, fail)
    assert len(lines(run(settings_for(tmp_path, "r", "run.rounds=2")))) == 3
    said = [r.getMessage() for r in warnings.records if "tracker" in r.getMessage()]
    assert said == ["tracker tensorboard: OSError: no route. The run goes on without it"]


def test_a_tracker_that_is_not_installed_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = settings_for(tmp_path, "r", "run.report-to=wandb")
    with Trackers(settings, tmp_path, "1234abcd", 1) as trackers:
        trackers.log({"round": 1})
    assert len(warnings.records) == 1 and "pip install 'rankfit[wandb]'" in warnings.text


def test_an_unknown_tracker_is_refused_before_the_start() -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'comet'; expected tensorboard, wandb"):
        compose(["run.report-to=tensorboard,comet"])
    assert compose(["run.report-to="]).run.report_to == ""


#: Reads a tracker's own store back, in a process of its own: prints {name: [[step, value], …]}.
_READERS = {
    "wandb": """
import glob, json, sys
from wandb.proto import wandb_internal_pb2

def records(data):
    # LevelDB's log: behind a head of 7 bytes, blocks of 32 KiB of (sum 4, length 2, kind 1, bytes)
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""

found = {}
(file,) = glob.glob(sys.argv[1] + "/wandb/offline-run-*/*.wandb")
for data in records(open(file, "rb").read()):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    if record.WhichOneof("record_type") == "history":
        items = record.history.item
        row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
        for name, value in row.items():
            if not name.startswith("_"):
                found.setdefault(name, []).append([row["_step"], value])
print(json.dumps(found))
""",
    "mlflow": """
import json, os, sys
import mlflow
client = mlflow.MlflowClient("sqlite:///" + os.path.dirname(sys.argv[1]) + "/mlflow.db")
experiment = client.get_experiment_by_name("rankfit")
(run,) = client.search_runs([experiment.experiment_id])
assert run.data.params["run.rounds"] == "2", run.data.params
found = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
print(json.dumps({name: [[m.step, m.value] for m in all_] for name, all_ in found.items()}))
""",
    "trackio": """
import json
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("rankfit")
found = {}
for row in SQLiteStorage.get_logs("rankfit", run.name):
    for name, value in row.items():
        if name not in ("step", "timestamp"):
            found.setdefault(name, []).append([row["step"], value])
print(json.dumps(found))
""",
}


@pytest.mark.parametrize("name", _READERS)
def test_the_same_run_is_equal_in_every_tracker(name: str, tmp_path: Path) -> None:
    """Written and read by the libraries themselves, offline."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'rankfit[{name}]'")
    own = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    env = {**os.environ, **own, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    report = f"run.report-to=tensorboard,{name}"
    start = (
        "import sys; from pathlib import Path; from tests.server.federation import run, "
        "settings_for; run(settings_for(Path(sys.argv[1]), 'r', 'run.rounds=2', sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", start, str(tmp_path), report], env=env, check=True)
    folder = tmp_path / "r"
    read = [sys.executable, "-c", _READERS[name], str(folder)]
    out = subprocess.run(read, env=env, check=True, capture_output=True, text=True).stdout
    found = {
        k: [(int(s), float(v)) for s, v in p] for k, p in json.loads(out.splitlines()[-1]).items()
    }
    assert_same(found, wanted(folder))
    assert_same(tensorboard(folder), wanted(folder))
