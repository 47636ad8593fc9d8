"""Merging one layer: RankFit's engine beside straightforward forms of what others do.

``python benchmarks/merge.py [--shapes 3072x3072 …] [--clients 100 …]``, one process, one thread,
CPU seconds; a part of the grid replaces its part of the results. ``--held-out`` draws other shapes
instead and uses the environment as it comes; see ``benchmarks/merge_held_out.py``.
Client ranks cycle through 4, 8, 16, 32, 64; the global rank is 64. Times include stacking.

- dense: Σ w·B·A, then a full SVD (FlexLoRA).
- factors: zero-padded mean of the factors, their product, then a full SVD (HRALoRA).
- qr: QR of both stacks and an SVD of the core (NVFlare); left out where the stack is wider than the
  matrix and it can only lose to the dense form.
- cold, warm: the engine at its default tolerance, without and with last round's directions.
- exact: the engine at tolerance 0.
- padded: RankFit's merge of the same matrix as *factors*, the zero-padded mean, re-factorised.

The mean of the factors is another matrix than the mean of the products, of which every client's
product is no part: *padded* is to be compared with *factors*, the others with each other.
``excess`` is the total error over that of the best rank-64 approximation, less 1; ``distance`` is
how far the result is from that approximation, relative to it; of *padded*, from *factors*.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine, write_record  # noqa: E402
from benchmarks.merge_held_out import held_out  # noqa: E402
from rankfit.adapters.adapter import Adapter, Factors  # noqa: E402
from rankfit.adapters.lowrank import Spectrum  # noqa: E402
from rankfit.adapters.merge import (  # noqa: E402
    PaddedChange,
    ProductSum,  # noqa: E402
    Update,
)
from rankfit.adapters.product_merges import Refactored  # noqa: E402

RANKS = (4, 8, 16, 32, 64)
RANK = 64
TOLERANCE = 0.005
SHAPES = ((768, 768), (3072, 768), (768, 3072), (3072, 3072), (4096, 4096))
CLIENTS = (10, 50, 100, 1000)
RESULT = Path(__file__).parent / "results" / "merge.json"
#: What the record keeps of a case: what it is, the CPU seconds of each way, and the errors.
KEY = ("d", "k", "clients", "spectrum")
ERRORS = ("cold excess", "dense distance", "padded distance")


@dataclass(frozen=True)
class Case:
    """One layer of one round.

    Attributes
    ----------
    factors : Sequence[Factors]
        Of each client, all with weight 1 / clients.
    before : Tensor
        (RANK, k): right directions of a round that was like it.
    """

    d: int
    k: int
    spectrum: str
    factors: Sequence[Factors]
    before: Tensor

    @property
    def weight(self) -> float:
        """Of each client."""
        return 1 / len(self.factors)


def case(d: int, k: int, clients: int, spectrum: str) -> Case:
    """Clients that agree on a decaying spectrum but for noise, or on nothing (flat)."""
    generator = torch.Generator().manual_seed(clients)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count = min(256, d, k)
    u, v = torch.linalg.qr(random(d, count))[0], torch.linalg.qr(random(k, count))[0].T
    root = torch.arange(1, count + 1) ** -0.5
    factors = []
    for client in range(clients):
        rank = RANKS[client % len(RANKS)]
        if spectrum == "flat":
            factors.append(Factors(random(d, rank) / d**0.5, random(rank, k) / k**0.5))
            continue
        b = u[:, :rank] * root[:rank] + 0.1 * random(d, rank) / d**0.5
        a = root[:rank, None] * v[:rank] + 0.1 * random(rank, k) / k**0.5
        factors.append(Factors(b, a))
    noise = 0.3 * random(RANK, k) / k**0.5
    return Case(d, k, spectrum, factors, v[:RANK] + noise)


def dense(own: Case) -> Spectrum:
    """FlexLoRA's way."""
    total = torch.zeros(own.d, own.k)
    for factors in own.factors:
        total += own.weight * (factors.b @ factors.a)
    return _cut(*torch.linalg.svd(total, full_matrices=False))


def factor_mean(own: Case) -> Spectrum:
    """HRALoRA's way; not the mean of the products."""
    b, a = torch.zeros(own.d, RANK), torch.zeros(RANK, own.k)
    for factors in own.factors:
        b[:, : factors.rank] += own.weight * factors.b
        a[: factors.rank] += own.weight * factors.a
    return _cut(*torch.linalg.svd(b @ a, full_matrices=False))


def qr(own: Case) -> Spectrum:
    """NVFlare's way."""
    left = torch.cat([own.weight * factors.b for factors in own.factors], 1)
    right = torch.cat([factors.a for factors in own.factors], 0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T)
    return Spectrum(q_left @ u[:, :RANK], values[:RANK], vt[:RANK] @ q_right.T)


def engine(tolerance: float, warm: bool) -> Callable[[Case], Spectrum]:
    """RankFit's."""

    def merge(own: Case) -> Spectrum:
        total = ProductSum(own.d, own.k)
        for factors in own.factors:
            total.add(factors, own.weight)
        start = own.before if warm else None
        return total.strongest(RANK, tolerance, torch.Generator().manual_seed(0), start)

    return merge


def padded(own: Case) -> Spectrum:
    """RankFit's merge for the methods that average factors."""
    module = "layer"

    def adapter(factors: Factors) -> Adapter:
        return Adapter({module: factors}, 1.0)

    nothing = {
        rank: adapter(Factors(torch.zeros(own.d, rank), torch.zeros(rank, own.k))) for rank in RANKS
    }
    merge = Refactored(nothing[RANK], 0, inner=PaddedChange)
    for factors in own.factors:
        merge.add(Update(nothing[factors.rank], adapter(factors), 1.0))
    found = merge.finish().factors[module]
    return Spectrum(found.b, torch.ones(RANK), found.a)


WAYS: dict[str, Callable[[Case], Spectrum]] = {
    "dense": dense,
    "factors": factor_mean,
    "qr": qr,
    "cold": engine(TOLERANCE, warm=False),
    "warm": engine(TOLERANCE, warm=True),
    "exact": engine(0.0, warm=False),
    "padded": padded,
}
#: Straightforward ways to the mean of the products.
PEERS = ("dense", "qr")


def measure(own: Case) -> dict[str, dict[str, float]]:
    """CPU seconds and errors of every way."""
    whole = ProductSum(own.d, own.k)
    for factors in own.factors:
        whole.add(Factors(factors.b.double(), factors.a.double()), own.weight)
    matrix = whole.dense()
    least, references, found = 0.0, dict[str, Tensor](), {}
    for name in ("exact", *(way for way in WAYS if way != "exact")):
        width = sum(factors.rank for factors in own.factors)
        if name == "qr" and width > 2 * min(own.d, own.k):
            continue
        seconds, spectrum = _timed(WAYS[name], own)
        result = (spectrum.u.double() * spectrum.values.double()) @ spectrum.vt.double()
        error = float(torch.linalg.norm(matrix - result))
        if name in ("exact", "factors"):
            references[name] = result
            least = least or error
        reference = references["factors" if name == "padded" else "exact"]
        distance = float(torch.linalg.norm(result - reference) / torch.linalg.norm(reference))
        found[name] = {"seconds": seconds, "excess": error / least - 1, "distance": distance}
    return found


def _timed(way: Callable[[Case], Spectrum], own: Case) -> tuple[float, Spectrum]:
    """Best CPU seconds of up to twenty runs, or of as many as fit into three seconds."""
    times: list[float] = []
    while not times or (len(times) < 20 and sum(times) < 3):
        began = time.thread_time()
        spectrum = way(own)
        times.append(time.thread_time() - began)
    return min(times), spectrum


def _cut(u: Tensor, values: Tensor, vt: Tensor) -> Spectrum:
    return Spectrum(u[:, :RANK], values[:RANK], vt[:RANK])


def _line(result: dict[str, Any]) -> list[str]:
    ways = result["ways"]
    peers = [ways[name]["seconds"] for name in PEERS if name in ways]
    cells = [f"{result['d']}x{result['k']}", str(result["clients"]), result["spectrum"]]
    cells += [f"{ways[name]['seconds']:.3f}" if name in ways else "-" for name in WAYS]
    cells.append(f"{min(peers) / ways['cold']['seconds']:.2f}")
    cells.append(f"{ways['factors']['seconds'] / ways['padded']['seconds']:.1f}")
    cells.append(f"{ways['qr']['seconds'] / ways['cold']['seconds']:.1f}" if "qr" in ways else "-")
    return [*cells, f"{100 * ways['cold']['excess']:.2f} %"]


def main() -> None:
    """Run the grid, show the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[f"{d}x{k}" for d, k in SHAPES])
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--held-out", action="store_true", help="shapes drawn anew")
    parser.add_argument("--cases", type=int, default=60, help="of --held-out")
    parser.add_argument("--seed", type=int, default=None, help="of --held-out, to draw them again")
    parser.add_argument("--busy", action="store_true", help="beside two busy processes")
    options = parser.parse_args()
    if options.held_out:
        seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
        held_out(options.cases, seed, options.busy)
        return
    torch.set_num_threads(1)
    console = Console(width=160)
    results = _before(options.output)
    table = Table(
        "shape",
        "clients",
        "spectrum",
        *WAYS,
        "best / cold",
        "factors / padded",
        "qr / cold",
        "excess",
    )
    for shape in options.shapes:
        d, k = map(int, shape.split("x"))
        for clients in options.clients:
            for spectrum in ("decaying", "flat"):
                ways = measure(case(d, k, clients, spectrum))
                result = {"d": d, "k": k, "clients": clients, "spectrum": spectrum, "ways": ways}
                results[_key(result)] = result
                console.print(" ".join(_line(result)))
                record = {"benchmark": "merge", "command": "python benchmarks/merge.py"}
                record |= {"rank": RANK, "tolerance": TOLERANCE} | machine("torch")
                write_record(
                    options.output, record | summary([results[k] for k in sorted(results)])
                )
    for key in sorted(results):
        table.add_row(*_line(results[key]))
    console.print(table)


def _key(result: dict[str, Any]) -> tuple[int, int, int, str]:
    return result["d"], result["k"], result["clients"], result["spectrum"]


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is committed of the results: one row of ``columns`` for each case."""
    rows = []
    for result in results:
        ways = result["ways"]
        row = [result[key] for key in KEY]
        row += [ways[way]["seconds"] if way in ways else None for way in WAYS]
        rows.append([*row, *(_error(ways, name) for name in ERRORS)])
    return {"columns": [*KEY, *(f"{way} seconds" for way in WAYS), *ERRORS], "rows": rows}


def _error(ways: dict[str, dict[str, float]], name: str) -> float:
    way, error = name.split()
    return ways[way][error]


def _before(path: Path) -> dict[tuple[int, int, int, str], dict[str, Any]]:
    """Results of earlier runs, which a run of part of the grid leaves as they are."""
    if not path.is_file():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    results = [dict(zip(known["columns"], row, strict=True)) for row in known["rows"]]
    for result in results:
        result["ways"] = {
            way: {"seconds": result[f"{way} seconds"]}
            for way in WAYS
            if result[f"{way} seconds"] is not None
        }
        for name in ERRORS:
            way, error = name.split()
            result["ways"][way][error] = result[name]
    return {_key(result): result for result in results}


if __name__ == "__main__":
    main()
