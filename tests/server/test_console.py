"""What a run says while it goes on: no silent phase, a line per client, and plain text in files."""

import logging
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from flwr.app import Message

from rankfit.cli.flower import _stream, environment
from rankfit.server.reporting import WIDTH, client_lines, console
from tests.server.federation import run, settings_for


def test_each_phase_and_each_client_has_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(message: Message, reply: Message) -> Message:
        raise RuntimeError("broken")

    logging.getLogger("rankfit").propagate = True
    caplog.set_level(logging.INFO, "rankfit")
    run(settings_for(tmp_path, "r", "run.rounds=1"), {3: fail})
    said = [record.getMessage() for record in caplog.records]
    phases = ("loading data", "waiting for clients", "round 1: 4 clients load", "round 1/1, ")
    places = [next(i for i, text in enumerate(said) if text.startswith(p)) for p in phases]
    assert places == sorted(places)
    pattern = (
        r"  partition-1: rank 2, 5\.97 of 5\.97 MiB planned of 5\.98 MiB, "
        r"micro-batch 32 × 1, \d+\.\d s"
    )
    assert any(re.fullmatch(pattern, text) for text in said), said
    (failed,) = [text for text in said if text.startswith("  partition-3")]
    assert "– of 3.24 MiB planned of 4.00 MiB" in failed and "dropped: " in failed


def test_a_large_round_is_cut_short() -> None:
    line = {"clients": {f"c-{n}": {"rank": 1, "merged": True} for n in range(20)}}
    lines = client_lines(line, {})
    assert len(lines) == 17 and lines[2] == "  c-2: rank 1" and lines[-1] == "  and 4 clients more"


@pytest.mark.parametrize(
    ("columns", "width"), [("100", 100), ("10", 60), ("", WIDTH), ("x", WIDTH)]
)
def test_the_width_is_the_terminals(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKFIT_COLUMNS", columns)
    assert console().width == width


def test_the_servers_process_hears_the_width_of_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANKFIT_COLUMNS", raising=False)
    leader, terminal = pty.openpty()
    with open(terminal, "w") as screen, open(os.devnull, "w") as nothing:
        monkeypatch.setattr(sys, "stdout", nothing)
        assert "RANKFIT_COLUMNS" not in environment(1)
        monkeypatch.setattr(sys, "stdout", screen)
        assert environment(1)["RANKFIT_COLUMNS"].isdecimal()
    os.close(leader)


def test_no_colour_codes_where_the_output_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = r"print('\x1b[92mINFO\x1b[0m: Successfully started run 7')"
    assert _stream([sys.executable, "-c", code], dict(os.environ), None, "") == "7"
    assert capsys.readouterr().out == "INFO: Successfully started run 7\n"
