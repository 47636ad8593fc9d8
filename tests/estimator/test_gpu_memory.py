"""benchmarks/gpu_memory.py: what of it needs no GPU, and the estimator against its results."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_memory
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.memory import Footprint

ROOT = Path(__file__).resolve().parents[2]
CASE = gpu_memory.Case("deit-small", "sdpa", "fp32", False, 8, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, capsys: Any):
    out = tmp_path / "gpu.json"
    assert gpu_memory.main(["--out", str(out)]) == gpu_memory.NO_GPU
    assert "No GPU is here" in capsys.readouterr().out and not out.exists()


def test_the_grid_holds_every_kind_of_step():
    cases = list(gpu_memory.grid())
    assert len(cases) == len(set(cases)) >= len(gpu_memory.MODELS) * (16 + 7)
    whole = cases[: len(gpu_memory.MODELS) * 16]
    for field in ("attention", "precision", "checkpointing", "rank"):
        assert len({getattr(case, field) for case in whole}) == 2
    assert {case.precision for case in cases} == {"fp32", "bf16", "fp16"}
    assert {case.autocast for case in cases} == {"none", "bf16", "fp16"}
    assert {case.optimizer for case in cases} >= {"adamw", "adamw-fused", "sgd", "adafactor"}


@pytest.mark.parametrize(
    "changes", [{"precision": "fp16"}, {"autocast": "bf16"}, {"optimizer": "adamw-fused"}]
)
def test_every_kind_of_step_is_predicted(changes: dict[str, str]):
    plain, other = (
        gpu_memory.predict(replace(CASE, rank=128, **each), "9.0") for each in ({}, changes)
    )
    assert plain["live"] != other["live"]


def test_what_is_predicted_is_what_a_plan_would_rest_on():
    predicted = gpu_memory.predict(CASE, "9.0")
    assert predicted["live"] <= predicted["blocks"] <= predicted["reserved"]
    spec = gpu_memory.spec_of(CASE, "9.0")
    trace = gpu_memory.TRACES(spec)
    assert predicted["live"] == trace.peak_live(8, calibration=Calibration.cuda("9.0"))
    more = gpu_memory.predict(replace(CASE, rank=128), "9.0")
    assert all(more[key] > predicted[key] for key in predicted)


def test_the_rank_above_the_slack_is_the_first_that_cannot_live():
    spec = gpu_memory.spec_of(CASE, "9.0")
    footprint = Footprint((gpu_memory.TRACES(spec),), Calibration.cuda("9.0"))
    cap = footprint.live(20)
    assert gpu_memory.slack_rank(footprint, cap, 256) == 21
    assert gpu_memory.slack_rank(footprint, footprint.live(256), 256) is None


def test_a_record_is_shown_with_its_errors():
    measured = gpu_memory.predict(CASE, "9.0")
    off = gpu_memory.errors({"live": 110}, {"live": 100})
    assert off == {"live": pytest.approx(0.1)}
    rows = [
        {"case": asdict(CASE), "predicted": measured, "measured": measured},
        {"case": asdict(CASE), "predicted": measured, "out-of-memory": "too large"},
    ]
    caps = [{"model": "deit-small", "cap": 2 * 2**30, "planned": None, "reason": "too large"}]
    peaks, capped = gpu_memory.show({"rows": rows, "caps": caps})
    assert peaks.row_count == 2 and capped.row_count == 1


def test_the_estimator_against_the_committed_measurements_or_the_statement_that_there_are_none():
    """Where a GPU has measured: live bytes in 1 %, reserved in 5 %, and every cap as planned."""
    if not gpu_memory.OUT.exists():
        docs = (ROOT / "docs" / "estimator.md").read_text(encoding="utf-8")
        assert "`benchmarks/gpu_memory.py` has not yet run on a GPU" in docs
        return
    record = json.loads(gpu_memory.OUT.read_text(encoding="utf-8"))
    for row in record["rows"]:
        if "measured" not in row:
            continue
        case = gpu_memory.Case(**row["case"])
        off = gpu_memory.errors(
            gpu_memory.predict(case, record["hardware"]["capability"]), row["measured"]
        )
        assert abs(off["live"]) <= 0.01 and abs(off["reserved"]) <= 0.05, case
    for row in record["caps"]:
        assert row["planned"] is None or (row["trained"] and row["failed"] is not False), row
