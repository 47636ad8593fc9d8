"""What report.html says of a run, and that its snippet runs as it stands."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Message

from rankfit.server.report import _line_plot, versions
from tests.conftest import ROOT
from tests.server.federation import run, settings_for
from tests.server.test_loop import lines


def raising(message: Message, reply: Message) -> Message:
    raise RuntimeError("broken")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds in which one client always fails."""
    place = tmp_path_factory.mktemp("runs")
    return run(settings_for(place, "told", "best.metric=accuracy", "run.seed=4"), {3: raising})


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


def section(page: str, heading: str) -> str:
    return page.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]


def test_when_how_long_and_with_what(page: str) -> None:
    assert re.search(r"Finished \d{4}-\d\d-\d\d \d\d:\d\d UTC; its rounds took \d+ min \d+ s", page)
    assert "Seed 4" in page and all(one in page for one in versions())


def test_each_devices_plan_beside_what_was_measured(folder: Path, page: str) -> None:
    devices = section(page, "Devices")
    peaks = [line["clients"]["partition-1"]["peak-memory-bytes"] for line in lines(folder)[1:]]
    (row,) = re.findall(r"<tr><td>partition-1</td>(.*?)</tr>", devices, re.DOTALL)
    cells = re.findall("<td>(.*?)</td>", row)
    assert cells[1:3] == ["declared", "5.98"] and cells[4] == f"{max(peaks) / 2**20:.2f}"
    assert cells[6:] == ["2", "32 × 1", "fp32", "memory"]
    for text in ("budget", "planned peak", "measured peak", "MiB", "partition-2"):
        assert f"<!-- {text} -->" in devices, "drawn too"
    assert "Lowest rank: 1, partition-0, held back by upload. Slowest: partition-" in devices


def test_curves_have_named_axes_and_whole_rounds(page: str) -> None:
    for text in ("round", "figure of the evaluation", "loss", "test accuracy", "holdout accuracy"):
        assert f"<!-- {text} -->" in page
    for last in (2, 3, 7):
        plot = _line_plot({"a": [(x, 0.0) for x in range(last + 1)]}, "round", "y")
        ticks = re.findall(r"xtick_\d+.*?<!-- (.*?) -->", plot, re.DOTALL)
        assert ticks and all(tick.isdecimal() for tick in ticks)


def test_faults_are_counted_and_listed(page: str) -> None:
    faults = section(page, "Faults")
    assert "3 ×" in faults and faults.count('class="dropped"') == 3 and "partition-3" in faults


def test_settings_that_differ_come_first(page: str) -> None:
    changed, _, rest = page.partition("<h2>Settings that differ")[2].partition("<details>")
    assert "<td>run.seed</td>" in changed and "<td>best.metric</td>" in changed
    assert "wire.delta" not in changed and "run.directory" not in changed and "wire.delta" in rest


def test_the_page_needs_nothing_else_and_names_no_place(folder: Path, page: str) -> None:
    assert "<script" not in page and "href=" not in page.replace('xlink:href="#', "")
    assert str(folder.parent) not in page


def test_the_snippet_runs_as_it_stands(folder: Path, page: str) -> None:
    (code,) = re.findall(r'<code id="load">(.*?)</code>', page, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", html.unescape(code)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    best = lines(folder)[-1]["best"]
    assert done.stdout.splitlines()[-1] == f"round {best}, 8 adapted modules"
