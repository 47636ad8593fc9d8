"""The tables of docs/security.md are those of the committed results, which hold what is said."""

import json
from pathlib import Path
from typing import Any

from benchmarks import attacks, honest_limits, poisoned
from rankfit.strategies.methods import METHODS
from tests.conftest import ROOT

DOCUMENT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_attacks() -> None:
    record = read(attacks.RESULT)
    for line in attacks.tables(record):
        assert line in DOCUMENT, line
    groups = record["attacks"]
    reports = sum(own["attacks"] for name, own in groups.items() if name.startswith("report"))
    assert reports >= 40 and groups["evaluations"]["attacks"] >= 20
    trainings = sum(own["attacks"] for own in groups.values()) - reports
    assert trainings - groups["evaluations"]["attacks"] >= 150
    assert all(own["moved-most"] <= record["moved-allowed"] for own in groups.values())
    for own in record["mutations"].values():
        assert own.get("read", 0) + own.get("refused", 0) == 50_000
        assert own["slowest-seconds"] < 1 and own["growth-mib"] < 100


def test_the_poisoned_clients() -> None:
    results = read(poisoned.RESULT)["results"]
    for line in poisoned.table(results):
        assert line in DOCUMENT, line
    found: dict[tuple[str, str, str], list[float]] = {}
    for own in results:
        key = (own["split"], own["merge"], own["attack"])
        found.setdefault(key, []).append(own["accuracy"])
    accuracy = {key: sum(each) / len(each) for key, each in found.items()}
    for split in ("iid", "dirichlet"):
        clean = accuracy[split, "default", "none"]
        for attack in ("scaled", "noise", "claims of weight"):
            assert accuracy[split, "default", attack] >= clean - 0.05, attack
        for attack in ("sign flip", "label flip"):
            assert accuracy[split, "cosine", attack] >= clean - 0.05, attack


def test_the_limits_cost_honest_clients_nothing() -> None:
    results = read(honest_limits.RESULT)["results"]
    assert {own["case"] for own in results} >= {*METHODS}
    for own in results:
        assert own["same-adapter"] and not own["refused"] and not own["largest-difference"], own
