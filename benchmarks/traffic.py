"""Bytes of adapter, up and down, of real Flower runs beside the arithmetic of their plans.

``python benchmarks/traffic.py``: the quickstart for two rounds through Flower's simulation (Ray),
with every method in float32 and with every wire type as ``rankfit``; some minutes. The bytes are
those of the arrays in the messages; the arithmetic is ranks times the bytes of a direction, and the
head. For what a method folds (``flora``, ``fedex-lora``) plans keep room at its full size, and the
ranks of the first round are added up here. A part of the methods replaces its part of the results.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, write_record  # noqa: E402
from rankfit.adapters.wire import WireType  # noqa: E402
from rankfit.cli.compare import over_ray  # noqa: E402
from rankfit.configs.compose import compose  # noqa: E402
from rankfit.configs.settings import RunSettings  # noqa: E402
from rankfit.estimator.round_time import Payload  # noqa: E402
from rankfit.strategies.methods import methods  # noqa: E402
from rankfit.tasks.base_model import load_base, shared_heads, target_modules  # noqa: E402

RESULT = Path(__file__).parent / "results" / "traffic.json"
ROUNDS = 2
#: What a round of ranks r folds has their sum as rank; and one r more for the average taken off.
FOLDING = {"flora": 0, "fedex-lora": 1}


def run(method: str, wire: WireType) -> dict[str, Any]:
    """Bytes of one run, measured and by its plans."""
    with tempfile.TemporaryDirectory() as folder:
        settings = compose(
            [
                "quickstart", f"run.directory={folder}", "run.name=traffic", f"run.rounds={ROUNDS}",
                f"method.name={method}", f"wire.dtype={wire}", "server.evaluate=none",
                *(["plan.download-seconds=0"] if method in FOLDING else []),
                *(["lora.form=kronecker"] if method == "lokr" else []),
            ]
        )  # fmt: skip
        over_ray(settings)
        rounds = _lines(Path(folder) / "traffic" / "rounds.jsonl")[1:]
        plans = _lines(Path(folder) / "traffic" / "plans.jsonl")
    payload = payload_of(settings)
    found = {"method": method, "wire": wire, "clients": 0}
    found |= dict.fromkeys(("up", "up-planned", "down", "down-planned"), 0)
    folded = dict.fromkeys(payload.shapes, 0)
    for line in rounds:
        trained = [_plan_at(plans, client, line["round"]) for client in line["clients"]]
        for plan, own in zip(trained, line["clients"].values(), strict=True):
            found["clients"] += 1
            found["up"] += own["upload-bytes"]
            found["up-planned"] += upload(payload, plan)
            found["down"] += own["download-bytes"]
            found["down-planned"] += download(payload, plan, folded if method in FOLDING else None)
        if method in FOLDING:
            parts = [_ranks(plan) for plan in trained]
            parts += [parts[0]] * FOLDING[method]
            folded = {
                module: min(sum(part.get(module, 0) for part in parts), *shape)
                for module, shape in payload.shapes.items()
            }
    return found


def payload_of(settings: RunSettings) -> Payload:
    """Shapes and head of the run's model."""
    base = load_base(settings, 10)
    targets = target_modules(base, settings.lora.targets)
    return Payload.of(base, targets, shared_heads(base, settings.head), settings.wire.dtype)


def upload(payload: Payload, plan: Mapping[str, Any]) -> int:
    """Factors that move, and the head."""
    return payload.head_bytes + sum(
        rank * payload.direction_bytes(module, plan["trainable"])
        for module, rank in _ranks(plan).items()
    )


def download(
    payload: Payload, plan: Mapping[str, Any], folded: Mapping[str, int] | None = None
) -> int:
    """Both factors, with the frozen rest where there is one, and the head."""
    ranks = _ranks(plan)
    if folded is None:
        whole = {m: max(ranks.get(m, 0), plan["remainder-rank"]) for m in payload.shapes}
    else:
        whole = {m: ranks.get(m, 0) + rank for m, rank in folded.items()}
    return payload.head_bytes + sum(
        rank * payload.direction_bytes(module) for module, rank in whole.items()
    )


def _ranks(plan: Mapping[str, Any]) -> dict[str, int]:
    return dict(zip(plan["modules"], plan["ranks"], strict=True))


def _plan_at(plans: list[dict[str, Any]], client: str, number: int) -> dict[str, Any]:
    known = [line for line in plans if line["client"] == client and line["round"] <= number]
    plan: dict[str, Any] = known[-1]["plan"]
    return plan


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=sorted(methods()))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    cases: list[tuple[str, WireType]] = [(method, "float32") for method in options.methods]
    cases += [("rankfit", wire) for wire in get_args(WireType) if wire != "float32"]
    known = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    results = {(own["method"], own["wire"]): own for own in known.get("results", [])}
    table = Table("method", "wire", "updates", "bytes up", "planned", "bytes down", "planned")
    for method, wire in cases:
        found = run(method, wire)
        results[method, wire] = found
        table.add_row(*(str(value) for value in found.values()))
        record = {"benchmark": "traffic", "rounds": ROUNDS, **machine("torch", "flwr", "ray")}
        record["results"] = [results[key] for key in sorted(results)]
        write_record(options.output, record)
    Console().print(table)


if __name__ == "__main__":
    main()
