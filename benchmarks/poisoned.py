"""A fifth of the clients is hostile: the plain merge, the default limits and robust merges.

The quickstart with 15 devices of three ranks, ten in a round; three of them (one of each rank) are
hostile in every round: they send the negative of their change, noise, ten times their change, train
on flipped labels, or claim 10⁹ samples; ``absent`` ones fail instead. With an uneven split their
data is missed, whatever the merge: the split into equal parts shows the attack alone. The server
knows nothing of what a client has, as where each node has data of its own: otherwise claims would
be bounded by the partition. What is in the JSON already is not run again.

    python -m benchmarks.poisoned       # a table, and benchmarks/results/poisoned.json
"""

import argparse
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord

from benchmarks.machine import machine, write_record, write_table
from rankfit.adapters.wire import leading
from rankfit.client.app import app as client_app
from rankfit.client.policy import everything
from rankfit.client.workspace import workspace
from rankfit.configs.compose import compose
from rankfit.configs.settings import RunSettings, from_flat, to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import RunFailed, federate
from rankfit.strategies.screening import Screening

RESULT = Path(__file__).parent / "results" / "poisoned.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
CLIENTS, HOSTILE = 15, (0, 1, 2)
MERGES: dict[str, tuple[str, ...]] = {
    "plain merge, no limits": (
        "server.norm-limit=0", "server.max-weight-share=1", "server.sample-changes=accept",
    ),
    "default": (),
    **{
        name: (f"server.robust={name}",)
        for name in ("norm-clipping", "trimmed-mean", "median", "geometric-median", "krum",
                     "multi-krum", "cosine")
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
    """Class c of ten is 9 − c while a client trains.

    Raises
    ------
    RuntimeError
        If the client has trained on other data than what was flipped.
    """
    space = workspace(from_flat(to_flat(settings)), None, everything())
    space.samples(0, CLIENTS)  # the partition is made from the labels as they are
    loaded, labels = workspace.cache_info().misses, space.task.train.labels
    kept = labels.copy()
    np.subtract(labels.max(), labels, out=labels)
    try:
        yield
    finally:
        labels[:] = kept
    if workspace.cache_info().misses != loaded:
        raise RuntimeError("the client has loaded the data anew: its labels were not flipped")


ATTACKS: dict[str, Callable[[Message, Message], None] | None] = {
    "none": None,
    "absent": None,
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
            if attack == "absent" and hostile and training:
                raise ConnectionError("this client has gone")
            flips = attack == "label flip" and hostile and training
            with flipped_labels(settings) if flips else nullcontext():
                reply = client_app(message, context)
            act = ATTACKS[attack]
            if act is not None and hostile and training:
                act(message, reply)
            return reply

        super().__init__(handle, to_flat(settings), nodes)


def measure(attack: str, merge: str, split: str, rounds: int, seed: int) -> dict[str, Any]:
    """One run."""
    own: dict[str, Any] = {"attack": attack, "merge": merge, "split": split, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        settings = compose(
            [
                "quickstart", f"run.directory={folder}", "run.name=poisoned", f"run.seed={seed}",
                f"run.rounds={rounds}", f"simulation.clients={CLIENTS}",
                f"server.min-clients={CLIENTS}", "server.clients-per-round=10",
                "server.diagnostics=false", f"partition.kind={split}",
                f"server.evaluate-every={rounds}", *MERGES[merge],
            ]
        )  # fmt: skip
        try:
            with redirect_stdout(None), patch.object(Screening, "know", lambda *known: None):
                federate(Hostile(settings, attack), settings)
        except RunFailed as error:
            return own | {"failed": str(error)}
        text = (Path(folder) / "poisoned" / "rounds.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    kinds = Counter(
        own["kind"]
        for line in lines
        for own in line.get("clients", {}).values()
        if not own["merged"]
    )
    if attack != "absent" and any(kind.startswith("client error") for kind in kinds):
        raise RuntimeError(f"clients that attack with {attack!r} failed instead: {kinds}")
    return own | {
        "accuracy": round(lines[-1]["evaluation"].get("accuracy", 0.0), 4),
        "dropped": dict(kinds),
        "updates": sum(line.get("updates", 0) for line in lines),
    }


def main() -> None:
    """Measure each attack with each merge, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--splits", nargs="*", default=["iid", "dirichlet"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--merges", nargs="*", default=list(MERGES), choices=list(MERGES))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    record = {"benchmark": "poisoned", "rounds": options.rounds, **machine("torch", "flwr")}
    results: list[dict[str, Any]] = []
    if options.output.exists():
        before = json.loads(options.output.read_text())
        results = before["results"] if before["rounds"] == options.rounds else []
    done = {(own["attack"], own["merge"], own["split"], own["seed"]) for own in results}
    for seed, split, merge, attack in product(
        options.seeds, options.splits, options.merges, options.attacks
    ):
        if (attack, merge, split, seed) not in done:
            results.append(measure(attack, merge, split, options.rounds, seed))
            write_record(options.output, record | {"results": results})
    lines = list(table(results))
    print("\n".join(lines))
    if options.output == RESULT:
        write_table(DOCUMENT, "poisoned", lines)


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Mean accuracy over the seeds by split, merge and attack, as a table of docs/security.md."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for own in results:
        key = (own["split"], own["merge"], own["attack"])
        found.setdefault(key, []).append(own.get("accuracy", 0.0))
    accuracy = {key: sum(each) / len(each) for key, each in found.items()}
    yield " | ".join(["| split | merge", *ATTACKS]) + " |"
    yield "|---" * (len(ATTACKS) + 2) + "|"
    for split, merge in sorted({(r["split"], r["merge"]) for r in results}, reverse=True):
        own = [accuracy.get((split, merge, attack)) for attack in ATTACKS]
        shown = ("–" if one is None else f"{one:.3f}" for one in own)
        yield " | ".join([f"| {split} | {merge}", *shown]) + " |"


if __name__ == "__main__":
    main()
