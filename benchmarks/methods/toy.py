"""Federated low-rank regression: what a merge costs when only the merge matters.

``python -m benchmarks.methods.toy`` trains every method of the catalogue that works on one layer,
through its own schedule, start and merge, and writes ``benchmarks/results/methods-toy.json``.

The task: a 64 × 64 matrix of rank 12 with a decaying spectrum, 20 clients, 5 a round, client ranks
2, 4 and 16 (a method of one rank: 2), global rank 16, ten AdamW steps a round, 120 rounds. Inputs
are IID, or half of each client's energy lies in eight dimensions of its own. The figure is
‖ŷ − y‖/‖y‖ on fresh IID inputs, mean of three seeds; the learning rate of each method is chosen on
a validation set of other inputs.
"""

import argparse
import json
import platform
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import write_record
from rankfit.adapters.adapter import Adapter, Factors, initial
from rankfit.adapters.merge import Update
from rankfit.adapters.names import Rates
from rankfit.configs.settings import RunSettings, from_flat
from rankfit.estimator.plan import Plan
from rankfit.strategies.methods import Method, find
from rankfit.strategies.server_update import ServerUpdate

WIDTH, TRUE_RANK, RANK = 64, 12, 16
CLIENTS, PER_ROUND, ROUNDS, STEPS, SAMPLES = 20, 5, 120, 10, 256
RANKS = (2, 4, 16)
#: Each singular value of the target is this share of the one before.
DECAY = 0.66
OWN_DIMENSIONS, OWN_ENERGY = 8, 0.5
RATES = (0.001, 0.003, 0.01, 0.03)
SEEDS = (0, 1, 2)
LAYER = "layer.0"
SETTING = {
    "width": WIDTH, "true-rank": TRUE_RANK, "decay": DECAY, "rank": RANK,
    "client-ranks": list(RANKS), "clients": CLIENTS, "per-round": PER_ROUND, "rounds": ROUNDS,
    "steps": STEPS, "samples": SAMPLES, "rates": list(RATES), "seeds": list(SEEDS),
    "own-dimensions": OWN_DIMENSIONS, "own-energy": OWN_ENERGY,
}  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "results" / "methods-toy.json"

#: Name in the table → method, parts that are switched off, and whether clients see the remainder.
METHODS: dict[str, tuple[str, str, bool]] = {
    "fedit": ("fedit", "", False),
    "hetlora": ("hetlora", "self-pruning", False),
    "fslora": ("fslora", "", False),
    "flexlora": ("flexlora", "", False),
    "raflora": ("raflora", "", False),
    "rbla": ("rbla", "", False),
    "flora": ("flora", "", False),
    "fedex-lora": ("fedex-lora", "", False),
    "ffa-lora": ("ffa-lora", "", False),
    "rolora": ("rolora", "", False),
    "alternating": ("alternating", "", False),
    "alternating + remainder": ("alternating", "", True),
    "rankfit without remainder": ("rankfit", "", False),
    "rankfit": ("rankfit", "", True),
}
ONE_RANK = {"fedit", "fedex-lora", "ffa-lora", "rolora"}


@dataclass(frozen=True)
class World:
    """One draw of the task: inputs and outputs of each client, for validation and for the test."""

    clients: list[tuple[Tensor, Tensor]]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def draw(cls, seed: int, iid: bool) -> "World":
        """Draw a world; IID inputs, or inputs concentrated in each client's own subspace."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        left, right = (torch.linalg.qr(normal(WIDTH, TRUE_RANK)).Q for _ in range(2))
        values = DECAY ** torch.arange(TRUE_RANK)
        target = left * (values / values.norm() * TRUE_RANK**0.5) @ right.T
        clients = []
        for _ in range(CLIENTS):
            inputs = normal(SAMPLES, WIDTH)
            own = torch.linalg.qr(normal(WIDTH, OWN_DIMENSIONS)).Q  # (width, own)
            if not iid:
                part = normal(SAMPLES, OWN_DIMENSIONS) @ own.T * (WIDTH / OWN_DIMENSIONS) ** 0.5
                inputs = (1 - OWN_ENERGY) ** 0.5 * inputs + OWN_ENERGY**0.5 * part
            clients.append((inputs, inputs @ target.T))
        fresh = [normal(1024, WIDTH) for _ in range(2)]
        return cls(clients, *((x, x @ target.T) for x in fresh))


def error(adapter: Adapter, data: tuple[Tensor, Tensor]) -> float:
    """‖ŷ − y‖/‖y‖."""
    inputs, outputs = data
    own = adapter.factors[LAYER]
    found = adapter.scale * (inputs @ own.a.T) @ own.b.T
    return float((found - outputs).norm() / outputs.norm())


def train(
    given: Adapter, frozen: Adapter | None, trainable: str, data: tuple[Tensor, Tensor],
    rate: float, own_rates: Rates,
) -> Adapter:  # fmt: skip
    """Ten full-batch AdamW steps of one client, gradients in closed form."""
    inputs, outputs = data
    if frozen is not None and LAYER in frozen.factors:
        rest = frozen.factors[LAYER]
        outputs = outputs - frozen.scale * (inputs @ rest.a.T) @ rest.b.T
    own = given.factors[LAYER]
    rates = {"b": rate * own_rates.b(own.rank), "a": rate * own_rates.a(own.rank, WIDTH)}
    b, a, scale = own.b.clone(), own.a.clone(), given.scale
    state = [[torch.zeros_like(t), torch.zeros_like(t)] for t in (b, a)]
    for step in range(1, STEPS + 1):
        hidden = inputs @ a.T  # (n, r)
        wrong = scale * (scale * hidden @ b.T - outputs) * (2 / len(inputs))  # (n, d)
        gradients = (wrong.T @ hidden, (wrong @ b).T @ inputs)
        for parameter, gradient, moments, name in zip(
            (b, a), gradients, state, ("b", "a"), strict=True
        ):
            if trainable not in ("both", name):
                continue
            moments[0].mul_(0.9).add_(gradient, alpha=0.1)
            moments[1].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            first, second = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
            parameter.sub_(rates[name] * first / (second.sqrt() + 1e-8))
    return Adapter({LAYER: Factors(b, a)}, scale)


def federate(
    method: Method,
    settings: RunSettings,
    remainder: bool,
    one_rank: bool,
    world: World,
    rate: float,
) -> Adapter:
    """All rounds of one method; return what it would export."""
    adapter = initial({LAYER: (WIDTH, WIDTH)}, RANK, 1.0, {}, settings.run.seed)
    advance = ServerUpdate(settings, method.start.folds)
    draw = np.random.default_rng(settings.run.seed)
    base = Plan({LAYER: RANK}, "both", 1, 1, False, 0, 0, "cap")
    for number in range(1, ROUNDS + 1):
        stage = method.schedule(number, settings)
        adapter = method.split(adapter)
        merge = method.merge(adapter, number)
        for client in sorted(draw.choice(CLIENTS, PER_ROUND, replace=False).tolist()):
            rank = min(RANKS) if one_rank else RANKS[client % len(RANKS)]
            plan = replace(base, ranks={LAYER: rank}, remainder_rank=RANK if remainder else 0)
            share = method.start.share(adapter, advance.folded, plan, 1000 * number + client)
            trained = train(
                share.given,
                share.frozen,
                stage.trainable,
                world.clients[client],
                rate,
                method.rates,
            )
            merge.add(Update(share.given, trained, float(SAMPLES), share.indices))
        adapter = advance(merge)
    return advance.exported(adapter)


def measure(label: str, iid: bool) -> dict[str, object]:
    """Test error of one row: mean over the seeds, at the rate that is best on validation."""
    name, without, remainder = METHODS[label]
    flat = {"method.name": name, "method.without": without, "lora.rank": RANK, "lora.alpha": RANK}
    worlds = [World.draw(seed, iid) for seed in SEEDS]
    found = {}
    for rate in RATES:
        adapters = []
        for seed, world in zip(SEEDS, worlds, strict=True):
            settings = from_flat({**flat, "run.seed": seed})
            method = find(name)
            adapters.append(federate(method, settings, remainder, name in ONE_RANK, world, rate))
        validation = [error(a, w.validation) for a, w in zip(adapters, worlds, strict=True)]
        found[statistics.mean(validation)] = (rate, adapters)
    rate, adapters = found[min(found)]
    errors = [error(a, w.test) for a, w in zip(adapters, worlds, strict=True)]
    return {"mean": statistics.mean(errors), "std": statistics.stdev(errors), "rate": rate}


def main() -> None:
    """Measure what is not yet in the results, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    same = before.get("setting") == SETTING and not arguments.fresh
    known = before["errors"] if same else {}
    for label in arguments.methods:
        for setting, iid in (("iid", True), ("own subspaces", False)):
            if setting not in known.setdefault(label, {}):
                known[label][setting] = measure(label, iid)
                _write(known)
    lines = ["| method | IID inputs | own subspaces |", "|---|---|---|"]
    for label in sorted(known, key=lambda row: known[row]["iid"]["mean"]):
        cells = [f"{known[label][s]['mean']:.4f}" for s in ("iid", "own subspaces")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


def _write(errors: dict[str, object]) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    command = "python -m benchmarks.methods.toy --fresh"
    record = {"command": command, "setting": SETTING, "versions": versions, "errors": errors}
    write_record(RESULTS, record)


if __name__ == "__main__":
    main()
