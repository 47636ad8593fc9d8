"""A fifth of the clients is hostile: the plain merge, the default limits and robust merges.

The quickstart with 15 devices of three ranks, ten in a round; three of them (one of each rank) are
hostile in every round: they send the negative of their change, noise, ten times their change, train
on flipped labels, or claim a thousand million samples.

    python -m benchmarks.poisoned       # a table, and benchmarks/results/poisoned.json
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from rankfit.adapters.wire import leading
from rankfit.client.app import app as client_app
from rankfit.client.workspace import workspace
from rankfit.configs.compose import compose
from rankfit.configs.settings import RunSettings, to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import RunFailed, federate

RESULT = Path(__file__).parent / "results" / "poisoned.json"
CLIENTS, HOSTILE = 15, (0, 1, 2)
MERGES: dict[str, tuple[str, ...]] = {
    "plain merge, no limits": ("server.norm-limit=0", "server.max-weight-share=1"),
    "default": (),
    **{
        name: (f"server.robust={name}",)
        for name in ("norm-clipping", "trimmed-mean", "median", "geometric-median", "krum",
                     "multi-krum")
    },
}  # fmt: skip
Change = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def moved(change: Change) -> Callable[[Message, Message], None]:
    """An attack on what the client changed in each array."""

    def attack(message: Message, reply: Message) -> None:
        given = {n: torch.from_numpy(a.numpy()) for n, a in message.content["adapter"].items()}
        noise = torch.Generator().manual_seed(message.metadata.dst_node_id)
        arrays = {}
        for name, array in reply.content["adapter"].items():
            trained = torch.from_numpy(array.numpy().copy())
            before = leading(given[name], trained)
            arrays[name] = Array((before + change(trained - before, noise)).numpy())
        reply.content["adapter"] = ArrayRecord(arrays)

    return attack


def claims(message: Message, reply: Message) -> None:
    """Claim a thousand million samples."""
    reply.content["metrics"] = MetricRecord(
        dict(reply.content["metrics"]) | {"num-examples": 10**9}
    )


@contextmanager
def flipped_labels(settings: RunSettings) -> Iterator[None]:
    """Class c of ten is 9 − c while a client trains."""
    labels = workspace(settings, None).task.train.labels
    kept = labels.copy()
    np.subtract(labels.max(), labels, out=labels)
    try:
        yield
    finally:
        labels[:] = kept


ATTACKS: dict[str, Callable[[Message, Message], None] | None] = {
    "none": None,
    "sign flip": moved(lambda change, noise: -change),
    "noise": moved(lambda change, noise: torch.randn(change.shape, generator=noise)),
    "scaled": moved(lambda change, noise: 10 * change),
    "label flip": None,
    "claims of weight": claims,
}


class Hostile(InProcessGrid):
    """Devices of which some attack."""

    def __init__(self, settings: RunSettings, attack: str) -> None:
        nodes = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]

        def handle(message: Message, context: Context) -> Message:
            hostile = context.node_config["partition-id"] in HOSTILE
            training = message.metadata.message_type == "train"
            flips = attack == "label flip" and hostile and training
            with flipped_labels(settings) if flips else nullcontext():
                reply = client_app(message, context)
            act = ATTACKS[attack]
            if act is not None and hostile and training:
                act(message, reply)
            return reply

        super().__init__(handle, to_flat(settings), nodes)


def measure(attack: str, merge: str, rounds: int, seed: int) -> dict[str, Any]:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = compose(
            [
                "quickstart", f"run.directory={folder}", "run.name=poisoned", f"run.seed={seed}",
                f"run.rounds={rounds}", f"simulation.clients={CLIENTS}",
                f"server.min-clients={CLIENTS}", "server.clients-per-round=10",
                "server.diagnostics=false", f"server.evaluate-every={rounds}", *MERGES[merge],
            ]
        )  # fmt: skip
        try:
            federate(Hostile(settings, attack), settings)
        except RunFailed as error:
            return {"attack": attack, "merge": merge, "seed": seed, "failed": str(error)}
        text = (Path(folder) / "poisoned" / "rounds.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return {
        "attack": attack,
        "merge": merge,
        "seed": seed,
        "accuracy": round(lines[-1]["evaluation"].get("accuracy", 0.0), 4),
        "dropped": sum(line.get("dropped", 0) for line in lines),
        "updates": sum(line.get("updates", 0) for line in lines),
    }


def main() -> None:
    """Measure each attack with each merge, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--merges", nargs="*", default=list(MERGES), choices=list(MERGES))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    results: list[dict[str, Any]] = []
    record = {"benchmark": "poisoned", "rounds": options.rounds, **machine("torch", "flwr")}
    table = Table("merge", *options.attacks)
    for merge in options.merges:
        row = [measure(a, merge, options.rounds, options.seed) for a in options.attacks]
        results += row
        table.add_row(merge, *(f"{own.get('accuracy', 0.0):.3f}" for own in row))
        options.output.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
