"""What the default limits cost honest clients: each method with them, and without any.

Honest runs must give the same adapter, bit by bit, with the default limits as with all limits off.
Every method of the catalogue runs on the quickstart's devices, and so do splits that are more
uneven, fewer and more clients, and the drift controls together. What is in the JSON already is not
run again.

    python -m benchmarks.honest_limits       # a table, and benchmarks/results/honest-limits.json
"""

import argparse
import hashlib
import json
import logging
import tempfile
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.machine import machine, write_record
from rankfit.client.app import app as client_app
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError, to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import federate
from rankfit.strategies.methods import METHODS

RESULT = Path(__file__).parent / "results" / "honest-limits.json"
LIMITS_OFF = ("server.norm-limit=0", "server.max-weight-share=1", "server.sample-changes=accept")
DRIFT = (
    "server.optimizer=adam", "server.learning-rate=0.05", "server.average=0.7",
    "server.sampling=samples", "train.proximal=0.01", "train.label-prior=1.0",
    "train.schedule=cosine",
)  # fmt: skip
LARGE = ("plan.download-seconds=0.0", "fleet.memory-mib=64")
CASES: dict[str, tuple[str, ...]] = {
    **{name: (f"method.name={name}",) for name in METHODS},
    "lokr": ("lokr",),
    # What is folded into the base is more than the quickstart's links and memory allow.
    "flora": ("method.name=flora", *LARGE),
    "fedex-lora": ("method.name=fedex-lora", *LARGE),
    "everybody in each round": ("server.clients-per-round=12",),
    "three in each round": ("server.clients-per-round=3",),
    "four uneven clients": (
        "simulation.clients=4", "server.min-clients=4", "server.clients-per-round=4",
        "partition.alpha=0.1", "partition.min-samples=5",
    ),
    "few and many samples": ("partition.alpha=0.1", "partition.min-samples=2"),
    "two classes each": ("partition.kind=pathological", "partition.classes-per-client=2"),
    "forty clients": (
        "simulation.clients=40", "server.clients-per-round=10", "partition.min-samples=2",
    ),
    "drift controls": DRIFT,
    "hralora preset, drift controls": ("method.name=hralora", "method.renew-every=1", *DRIFT),
    "sgd": ("train.optimizer=sgd", "train.learning-rate=0.1"),
    "int8": ("wire.dtype=int8",),
}  # fmt: skip


def play(case: str, seed: int, rounds: int, limits: tuple[str, ...]) -> dict[str, Any]:
    """Accuracies and updates by round, and the hash of the adapter at the end, of one run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = compose(
            [
                "quickstart", *CASES[case], f"run.directory={folder}", "run.name=honest",
                f"run.seed={seed}", f"run.rounds={rounds}", "server.diagnostics=false",
                "plan.read-memory=once", *limits,
            ]
        )  # fmt: skip
        count = settings.simulation.clients
        nodes = [{"partition-id": i, "num-partitions": count} for i in range(count)]
        with redirect_stdout(None):
            federate(InProcessGrid(client_app, to_flat(settings), nodes), settings)
        run = Path(folder) / "honest"
        lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        adapter = load_file(run / "checkpoint" / "adapter_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(adapter):
        digest.update(name.encode() + adapter[name].contiguous().numpy().tobytes())
    reasons = [own for line in lines for own in line.get("clients", {}).values()]
    return {
        "accuracy": [line["evaluation"]["accuracy"] for line in lines if "evaluation" in line],
        "updates": sum(line.get("updates", 0) for line in lines),
        "refused": [own["reason"] for own in reasons if not own["merged"]],
        "adapter": digest.hexdigest()[:16],
    }


def compared(case: str, seed: int, rounds: int) -> dict[str, Any]:
    """One case with the default limits and with none."""
    own: dict[str, Any] = {"case": case, "seed": seed}
    try:
        limited, free = (play(case, seed, rounds, limits) for limits in ((), LIMITS_OFF))
    except ConfigError as error:
        return own | {"cannot-run": str(error)[:200]}
    gap = max(abs(a - b) for a, b in zip(limited["accuracy"], free["accuracy"], strict=True))
    return own | {
        "accuracy": limited["accuracy"][-1],
        "accuracy-without-limits": free["accuracy"][-1],
        "largest-difference": gap,
        "same-adapter": limited["adapter"] == free["adapter"],
        "updates": limited["updates"],
        "updates-without-limits": free["updates"],
        "refused": limited["refused"],
    }


def main() -> None:
    """Compare all cases, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    record = {"benchmark": "honest-limits", "rounds": options.rounds, **machine("torch", "flwr")}
    results: list[dict[str, Any]] = []
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if before["rounds"] == options.rounds:
            results = [own for own in before["results"] if "cannot-run" not in own]
    done = {(own["case"], own["seed"]) for own in results}
    table = Table("case", "seed", "accuracy", "without limits", "same adapter", "refused")
    for seed, case in product(options.seeds, options.cases):
        if (case, seed) not in done:
            results.append(compared(case, seed, options.rounds))
            write_record(options.output, record | {"results": results})
    for own in results:
        shown = (own.get(k, "") for k in ("accuracy", "accuracy-without-limits", "same-adapter"))
        refused = str(len(own.get("refused", ())))
        table.add_row(own["case"], str(own["seed"]), *map(str, shown), refused)
    Console().print(table)


if __name__ == "__main__":
    main()
