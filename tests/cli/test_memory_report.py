"""``rankfit memory-report`` on a real run directory."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankfit.cli.main import app
from rankfit.cli.memory_commands import read_run
from rankfit.configs.settings import ConfigError
from tests.server.federation import run, settings_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quick = ("run.rounds=1", "train.steps=2", "server.evaluate=none", "method.name=flexlora")
    return run(settings_for(tmp_path_factory.mktemp("runs"), "short", *quick))


def report(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["memory-report", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_estimates_and_measurements_by_client_and_component(folder: Path):
    rows = json.loads(report(str(folder), "--measure", "--format", "json"))
    assert [row["client"] for row in rows] == [f"partition-{i}" for i in range(4)]
    for row in rows:
        assert abs(row["expected-bytes"] - row["measured-bytes"]) <= 1024
        split = row["components"]
        assert sum(split["estimated"].values()) == row["expected-bytes"]
        for name, nbytes in split["measured"].items():
            assert abs(split["estimated"][name] - nbytes) <= 256, name


def test_it_can_be_read_and_set(folder: Path):
    text = report(str(folder))
    assert "estimated and measured peaks" in text and "components" in text
    latex = report(str(folder), "--no-components", "--format", "latex")
    assert latex.startswith(r"\begin{tabular}") and "partition-3" in latex


def test_what_holds_no_run_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run"):
        read_run(tmp_path)
    for name in ("config.toml", "plans.jsonl", "rounds.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match="no round has a client with a measured peak yet"):
        read_run(tmp_path)
