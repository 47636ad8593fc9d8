"""A whole Llama-3.2-3B-shaped adapter from 100 clients, merged in one round.

``python benchmarks/merge_adapter.py [--layers 28] [--clients 100] [--threads 1]``: q, k, v, o,
gate, up and down of every layer; the global rank is 64, clients' ranks cycle through 4, 8, 16, 32,
64. Updates come one after the other, as they would from the grid; making them up is not counted.

The floor is what cannot be avoided: reading every update once at the measured bandwidth of memory,
and, at the measured rate of a float32 product, M·X and Mᵀ·Y with 64 columns each, M being the stack
of the updates (or the dense matrix that a stack wider than the matrix becomes, and making it).
Floor and ratio are in CPU seconds, which other processes change less than the wall clock; what
users wait for is the wall clock after the last update.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.machine import machine, write_record  # noqa: E402
from rankfit.adapters.adapter import Adapter, Factors  # noqa: E402
from rankfit.adapters.merge import Update  # noqa: E402
from rankfit.adapters.product_merges import MeanChange  # noqa: E402

RESULT = Path(__file__).parent / "results" / "merge-adapter.json"
RANKS = (4, 8, 16, 32, 64)
RANK = 64
#: (d, k) of the modules of one layer: hidden size 3072, 8 of 24 heads for keys and values.
SHAPES = {
    "q_proj": (3072, 3072), "k_proj": (1024, 3072), "v_proj": (1024, 3072), "o_proj": (3072, 3072),
    "gate_proj": (8192, 3072), "up_proj": (8192, 3072), "down_proj": (3072, 8192),
}  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[int, int]]:
    """(d, k) of every adapted module."""
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in SHAPES.items()}


def reference(modules: dict[str, tuple[int, int]], generator: torch.Generator) -> Adapter:
    """A global adapter as after some rounds: orthogonal directions of decaying strength."""
    factors = {}
    root = (1 / torch.arange(1, RANK + 1)).sqrt()
    for module, (d, k) in modules.items():
        b, _ = torch.linalg.qr(torch.randn(d, RANK, generator=generator))
        a, _ = torch.linalg.qr(torch.randn(k, RANK, generator=generator))
        factors[module] = Factors((b * root).contiguous(), (a * root).T.contiguous())
    return Adapter(factors, 2.0)


def update(start: Adapter, rank: int, generator: torch.Generator) -> Update:
    """What a client of this rank returns: its start and noise a tenth as strong."""

    def moved(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + noise * (0.1 * tensor.norm() / tensor.numel() ** 0.5)

    given = {m: Factors(own.b[:, :rank], own.a[:rank]) for m, own in start.factors.items()}
    trained = {m: Factors(moved(own.b), moved(own.a)) for m, own in given.items()}
    return Update(Adapter(given, start.scale), Adapter(trained, start.scale), 1.0)


def rates() -> tuple[float, float]:
    """Bytes read from memory, and flops of a float32 product, in a CPU second of one thread."""
    large = torch.ones(1 << 28)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    reading = multiplying = float("inf")
    for _ in range(5):
        began = time.thread_time()
        large.sum()
        reading = min(reading, time.thread_time() - began)
        began = time.thread_time()
        left @ right
        multiplying = min(multiplying, time.thread_time() - began)
    return large.numel() * 4 / reading, 2 * 2048**3 / multiplying


def least_flops(modules: dict[str, tuple[int, int]], width: int) -> float:
    """Of all modules, for a stack of this rank."""
    total = 0.0
    for d, k in modules.values():
        if width < min(d, k):
            total += 2 * 2 * width * (d + k) * RANK
        else:
            total += 2 * width * d * k + 2 * 2 * d * k * RANK
    return total


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # of the rates and of making updates up; the engine sets its own
    generator = torch.Generator().manual_seed(0)
    modules = shapes(options.layers)
    bandwidth, rate = rates()
    start = reference(modules, generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    merge = MeanChange(start, 0)
    merge.tolerance, merge.threads = options.tolerance, options.threads
    adding, received, width, cpu = 0.0, 0, 0, 0.0
    for client in range(options.clients):
        own = update(start, RANKS[client % len(RANKS)], generator)
        received += 4 * own.trained.parameters()
        width += RANKS[client % len(RANKS)]
        began, cpu_began = time.perf_counter(), time.process_time()
        merge.add(own)
        adding += time.perf_counter() - began
        cpu += time.process_time() - cpu_began
    began, cpu_began = time.perf_counter(), time.process_time()
    merge.finish()
    finishing = time.perf_counter() - began
    cpu += time.process_time() - cpu_began
    floor = received / bandwidth + least_flops(modules, width) / rate
    record = {
        "benchmark": "merge-adapter",
        "settings": {key: str(value) for key, value in vars(options).items() if key != "output"},
        **machine("torch"),
        "seconds": {"add": adding, "after-the-last-update": finishing},
        "cpu-seconds": cpu,
        "gigabytes-received": received / 1e9,
        "resident-mib": {
            "before": before,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
        "rates": {"bytes-a-second": bandwidth, "flops": rate},
        "floor-seconds": floor,
        "ratio": cpu / floor,
    }
    write_record(options.output, record)
    Console().print_json(data=record)


if __name__ == "__main__":
    main()
