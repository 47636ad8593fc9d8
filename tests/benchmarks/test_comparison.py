"""The comparison's own parts: clients side by side, rates from a validation split, its table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from benchmarks.methods import digits, grid
from benchmarks.methods.grid import Grid, Setting, figures, table
from benchmarks.methods.side_by_side import SideBySide
from benchmarks.methods.side_by_side import run as side_by_side
from rankfit.configs.settings import ConfigError, RunSettings
from tests.conftest import ROOT
from tests.server.federation import run, settings_for
from tests.server.test_loop import lines

SMALL = (
    "run.rounds=2", "simulation.clients=3", "server.min-clients=3", "server.clients-per-round=3",
    "partition.kind=dirichlet", "partition.alpha=0.3", "train.steps=3", "train.proximal=0.01",
)  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        ("method.name=rankfit",),  # a remainder
        ("method.name=flexlora", "train.moments=kept"),
        ("method.name=fslora",),  # a scale for each client
        ("method.name=hetlora", "method.prune-weight=0.3"),
        ("method.name=lokr", "lora.form=kronecker"),
        # One factor a round, and modules that some clients lack.
        ("method.name=hralora", "method.warm-up-rounds=0"),
    ],
    ids=lambda parts: parts[0].removeprefix("method.name="),
)
def test_clients_side_by_side_train_as_one_after_the_other(
    method: tuple[str, ...], tmp_path: Path
) -> None:
    together = settings_for(tmp_path, "together", *SMALL, *method)
    side_by_side(together)
    apart = settings_for(tmp_path, "apart", *SMALL, *method)
    run(apart)
    for one, other in zip(lines(tmp_path / "together"), lines(tmp_path / "apart"), strict=True):
        assert one["evaluation"]["loss"] == pytest.approx(other["evaluation"]["loss"], rel=1e-3)
        for name, client in one.get("clients", {}).items():
            same = other["clients"][name]
            assert client["train-loss"] == pytest.approx(same["train-loss"], rel=1e-3)
            for key in ("rank", "parameters", "upload-bytes", "download-bytes", "steps"):
                assert client[key] == same[key]
    left, right = (
        load_file(tmp_path / name / "checkpoint" / "adapter_model.safetensors")
        for name in ("together", "apart")
    )
    for name, tensor in left.items():
        if ".lora_" not in name:  # the sign of a direction of a product may differ
            assert torch.allclose(tensor, right[name], atol=1e-4)


@pytest.mark.parametrize("setting", ["lora.dropout=0.1", "train.steps=0", "train.optimizer=sgd"])
def test_what_cannot_be_trained_side_by_side_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        SideBySide(settings_for(tmp_path, "bad", *SMALL, setting))


def test_the_rate_comes_from_the_validation_split_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On validation .01 is best, with the average .003; on the test set .03 would be."""
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    ran: list[tuple[str, float, int]] = []

    def runner(settings: RunSettings) -> None:
        validates = settings.data.test == ""
        rate = settings.train.learning_rate
        ran.append(("validation" if validates else "test", rate, settings.run.seed))
        best, best_average = (0.01, 0.003) if validates else (0.03, 0.03)
        folder = Path(settings.run.directory) / settings.run.name
        folder.mkdir(parents=True)
        plain, average = (0.9 if rate == r else 0.5 for r in (best, best_average))
        line = {
            "round": settings.run.rounds, "upload-bytes": 1, "download-bytes": 2,
            "evaluation": {"accuracy": average, "unaveraged-accuracy": plain},
        }  # fmt: skip
        (folder / "rounds.jsonl").write_text(json.dumps(line) + "\n")

    parts = ("quickstart", "run.rounds=2")
    comparison = Grid(
        "toy", ("fedit", "rankfit"), (Setting("task/iid", parts),),
        {"task": Setting("task-validation", (*parts, "data.test="))}, (0.003, 0.01, 0.03), runner,
        (0, 1), (100, 101),
    )  # fmt: skip
    comparison.carry_out(tmp_path / "runs")
    tested = sorted(run for run in ran if run[0] == "test")
    assert tested == sorted([("test", rate, s) for s in (0, 1) for rate in (0.003, 0.01)] * 2)
    assert {seed for kind, _, seed in ran if kind == "validation"} == {100, 101}
    done = len(ran)
    comparison.carry_out(tmp_path / "runs")
    assert len(ran) == done, "what is done is not done again"
    known = json.loads((tmp_path / "methods-toy.json").read_text())
    assert known["rates"]["task"]["rankfit"] == [0.01, 0.9, 0.003, 0.9], "rate, accuracy there"
    assert table(known).count("**0.500 ± 0.000**") == 4
    whole = json.loads((tmp_path / "runs" / "methods-toy.json").read_text())
    assert whole["rates"]["task"]["rankfit"]["0.01"] == {
        "plain": [0.9] * 2, "average-0.8": [0.5] * 2,
    }  # fmt: skip


def test_a_summary_keeps_the_lines_that_were_not_measured_now() -> None:
    before = {"seeds": [0], "results": {"iid": {"fedit": [1.0], "rankfit": [2.0]}}, "rates": {}}
    now = {"seeds": [1], "results": {"iid": {"rankfit": [3.0]}, "other": {"fedit": [4.0]}}}
    found = grid.updated(before, now)
    assert found["seeds"] == [1]
    assert found["results"]["iid"] == {"fedit": [1.0], "rankfit": [3.0]}
    assert found["results"]["other"] == {"fedit": [4.0]}


def test_committed_results_are_summaries() -> None:
    """What every run gave is made again by the ``command`` in the file."""
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        assert file.stat().st_size < 16_000, f"{file.name} is no summary"


def test_the_tables_of_the_notes_are_those_of_the_summaries() -> None:
    notes = (ROOT / "benchmarks" / "notes" / "methods.md").read_text(encoding="utf-8")
    written = {line.replace("*", "") for line in notes.splitlines()}
    for name in ("digits", "digits-closer"):
        known = json.loads((grid.RESULTS / f"methods-{name}.json").read_text())
        rows = [line for line in table(known).splitlines() if " ± " in line]
        for line in (row for row in rows if "+" not in row):
            assert line.replace("*", "").replace("0.", ".") in written, f"methods-{name}: {line}"


def test_figures_are_those_of_the_last_ten_rounds() -> None:
    rounds = [
        {"round": n, "upload-bytes": 1, "download-bytes": 2,
         "evaluation": {"accuracy": n / 100, "unaveraged-accuracy": (20 - n) / 100}}
        for n in range(0, 21, 2)
    ]  # fmt: skip
    found = figures(rounds, 7)
    assert found["average-0.8"]["last"] == pytest.approx(0.16) and found["seed"] == 7
    assert found["plain"]["best"] == 0.18 and found["upload-bytes"] == 10


def test_shuffled_pictures_hold_the_same_patches_inverted() -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    shown = 255 - digits.shuffled(pictures)
    assert not np.array_equal(shown, pictures)
    for before, after in zip(pictures, shown, strict=True):
        assert _patches(before) == _patches(after)


def _patches(picture: NDArray[np.uint8]) -> list[bytes]:
    places = [(i, j) for i in range(0, 8, 2) for j in range(0, 8, 2)]
    return sorted(picture[i : i + 2, j : j + 2].tobytes() for i, j in places)
