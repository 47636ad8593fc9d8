"""Who holds what is saved with the run."""

import json
from pathlib import Path

import numpy as np

from rankfit.server.reporting import PARTITION, PLOT, Holdings


def test_a_partition_is_written_down_and_drawn(tmp_path: Path) -> None:
    labels = np.array([0, 0, 1, 2, 1, 0])
    parts = [np.array([0, 2]), np.array([1, 3, 4, 5])]
    Holdings(parts, labels, ("a", "b", "c", "d")).save(tmp_path)
    record = json.loads((tmp_path / PARTITION).read_text())
    assert record["classes"] == ["a", "b", "c", "d"] and record["examples"] == 6
    assert [one["counts"] for one in record["clients"]] == [[1, 1, 0, 0], [2, 1, 1, 0]]
    assert record["clients"][1]["indices"] == [1, 3, 4, 5]
    assert (tmp_path / PLOT).read_text().startswith("<?xml")


def test_many_classes_and_labels_that_are_numbers(tmp_path: Path) -> None:
    labels = np.arange(-2, 98)
    holdings = Holdings([np.arange(50), np.arange(50, 100)], labels, ())
    assert holdings.counts().shape == (2, 100) and holdings.counts().sum() == 100
    holdings.draw(tmp_path / "plot.svg")
    assert "81 others" in (tmp_path / "plot.svg").read_text()
