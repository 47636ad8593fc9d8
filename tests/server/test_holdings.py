"""Who holds what is saved with the run."""

import json
from pathlib import Path

import numpy as np

from rankfit.server.reporting import PARTITION, PLOT, Holdings
from tests.server.federation import run, settings_for
from tests.tasks.test_bad_records import save_words


def test_a_partition_is_written_down_and_drawn(tmp_path: Path) -> None:
    labels = np.array([0, 0, 1, 2, 1, 0])
    parts = [np.array([0, 2]), np.array([1, 3, 4, 5])]
    Holdings(parts, labels, ("a", "b", "c", "d")).save(tmp_path)
    record = json.loads((tmp_path / PARTITION).read_text())
    assert record["classes"] == ["a", "b", "c", "d"] and record["examples"] == 6
    assert [one["counts"] for one in record["clients"]] == [[1, 1, 0, 0], [2, 1, 1, 0]]
    assert record["clients"][1]["indices"] == [1, 3, 4, 5]
    assert (tmp_path / PLOT).read_text().startswith("<?xml")


def test_the_report_says_how_even_the_classes_are_and_how_long_the_texts(tmp_path: Path) -> None:
    texts = [("good " * (1 + row % 7)).strip() for row in range(60)]
    rows = [{"text": text, "label": "yes" if row % 4 else "no"} for row, text in enumerate(texts)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    model = save_words(tmp_path / "model")
    folder = run(
        settings_for(
            tmp_path / "runs", "long", "task.kind=text-classification", f"model.source={model}",
            f"data.source={tmp_path / 'train.json'}", "data.test=", "data.max-length=6",
            "fleet.memory-mib=", "run.rounds=1", "train.steps=1", "lora.rank=2",
            "partition.min-samples=1", "server.diagnostics=false",
        )
    )  # fmt: skip
    held = json.loads((folder / PARTITION).read_text())["clients"]
    assert [one["lengths"]["measured"] for one in held] == [one["samples"] for one in held]
    assert max(one["lengths"]["longest"] for one in held) == 6
    page = (folder / "report.html").read_text()
    assert "What clients hold" in page and "<td>yes (7" in page and "<td>6</td>" in page


def test_pictures_have_no_lengths(tmp_path: Path) -> None:
    folder = run(settings_for(tmp_path, "short", "run.rounds=1", "train.steps=1"))
    assert all(
        one["lengths"] == {} for one in json.loads((folder / PARTITION).read_text())["clients"]
    )
    assert "What clients hold" in (folder / "report.html").read_text()


def test_many_classes_and_labels_that_are_numbers(tmp_path: Path) -> None:
    labels = np.arange(-2, 98)
    holdings = Holdings([np.arange(50), np.arange(50, 100)], labels, ())
    assert holdings.counts().shape == (2, 100) and holdings.counts().sum() == 100
    holdings.draw(tmp_path / "plot.svg")
    assert "81 others" in (tmp_path / "plot.svg").read_text()
