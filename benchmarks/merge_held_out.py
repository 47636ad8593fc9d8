"""Merging one layer at shapes drawn anew, where the engine may be slower than dense or QR.

``python benchmarks/merge.py --held-out [--cases 60] [--seed N] [--busy]``. Sides of 256 to 16 384
(d ≠ k), 3 to 1 000 clients, ranks of 1 to 128, three spectra, in the environment as it comes: no
number of threads is set for anybody. ``--busy`` starts two processes that use a core each.

Every way is timed in CPU seconds of the whole process (threads that spin count) and in wall clock,
best of a few runs. It is slower where it takes over 10 % and over 2 ms more than the faster peer.
A peer is left out where even its multiplications alone, at the rate of this machine's fastest
matrix product with all cores, would take longer than ours took: it cannot win there.
"""

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from rankfit.adapters.adapter import Factors
from rankfit.adapters.lowrank import Spectrum
from rankfit.adapters.merge import ProductSum
from rankfit.adapters.threads import one_thread, usable_cores

SPECTRA = ("decaying", "flat", "shared")
TOLERANCE = 0.005
#: Numbers in all factors of a case; beyond it clients are left out, for the benchmark's memory.
MOST_NUMBERS = 400_000_000
#: Seconds that repetitions of one way may take.
PATIENCE = 1.0
RELATIVE, ABSOLUTE = 0.10, 0.002


@dataclass(frozen=True)
class Drawn:
    """A layer of one round, all clients with the same weight."""

    d: int
    k: int
    spectrum: str
    factors: list[Factors]

    @property
    def rank(self) -> int:
        """The global rank: the largest client's."""
        return max(own.rank for own in self.factors)

    @property
    def width(self) -> int:
        """Of the stack of all factors."""
        return sum(own.rank for own in self.factors)

    @property
    def weight(self) -> float:
        """Of each client."""
        return 1 / len(self.factors)


@dataclass(frozen=True)
class Seconds:
    """Of one way."""

    cpu: float
    wall: float


def draw(choose: random.Random) -> Drawn:
    """Draw a case; sizes are uniform in their logarithm."""

    def between(low: int, high: int) -> int:
        return round(math.exp(choose.uniform(math.log(low), math.log(high))))

    d = k = between(256, 16384)
    while k == d:
        k = between(256, 16384)
    clients, most = between(3, 1000), between(1, 128)
    ranks = [between(1, most) for _ in range(clients)]
    while sum(ranks) * (d + k) > MOST_NUMBERS and len(ranks) > 3:
        ranks.pop()
    spectrum = choose.choice(SPECTRA)
    return Drawn(d, k, spectrum, _factors(d, k, ranks, spectrum, choose.getrandbits(31)))


def _factors(d: int, k: int, ranks: list[int], spectrum: str, seed: int) -> list[Factors]:
    """Clients that agree on decaying directions, on nothing (flat), or on equal ones (shared)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count = max(ranks)
    strength = torch.arange(1, count + 1) ** (-0.5 if spectrum == "decaying" else 0.0)
    left = normal(d, count) / d**0.5 * strength
    right = normal(count, k) / k**0.5 * strength[:, None]
    own = 1.0 if spectrum == "flat" else 0.1
    common = 0.0 if spectrum == "flat" else 1.0
    return [
        Factors(
            common * left[:, :rank] + own * normal(d, rank) / d**0.5,
            common * right[:rank] + own * normal(rank, k) / k**0.5,
        )
        for rank in ranks
    ]


def dense(own: Drawn) -> Spectrum:
    """Sum of the products and a full SVD (FlexLoRA's way)."""
    total = torch.zeros(own.d, own.k)
    for factors in own.factors:
        total += own.weight * (factors.b @ factors.a)
    u, values, vt = torch.linalg.svd(total, full_matrices=False)
    return Spectrum(u[:, : own.rank], values[: own.rank], vt[: own.rank])


def qr(own: Drawn) -> Spectrum:
    """Two QR factorisations and an SVD of the core (NVFlare's way)."""
    left = torch.cat([own.weight * factors.b for factors in own.factors], 1)
    right = torch.cat([factors.a for factors in own.factors], 0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    rank = own.rank
    return Spectrum(q_left @ u[:, :rank], values[:rank], vt[:rank] @ q_right.T)


def least_flops(own: Drawn) -> dict[str, float]:
    """Multiplications and additions that the peers cannot do without."""
    large, small = max(own.d, own.k), min(own.d, own.k)
    bidiagonal = 4 * small**2 * (large - small / 3)
    reductions = [2 * n * m**2 - 2 * m**3 / 3 for n, m in map(_sorted, _stacks(own))]
    return {"dense": 2 * own.width * own.d * own.k + bidiagonal, "qr": sum(reductions)}


def _stacks(own: Drawn) -> list[tuple[int, int]]:
    return [(own.d, own.width), (own.k, own.width)]


def _sorted(shape: tuple[int, int]) -> tuple[int, int]:
    return max(shape), min(shape)


def engine(tolerance: float) -> Callable[[Drawn], Spectrum]:
    """RankFit's."""

    def merge(own: Drawn) -> Spectrum:
        total = ProductSum(own.d, own.k)
        for factors in own.factors:
            total.add(factors, own.weight)
        return total.strongest(own.rank, tolerance, torch.Generator().manual_seed(0))

    return merge


OURS = {"tolerance": engine(TOLERANCE), "exact": engine(0.0)}
PEERS = {"dense": dense, "qr": qr}


def compare(own: Drawn, rate: float) -> dict[str, Seconds]:
    """Seconds of every way that was run; ``rate`` is in flops a second."""
    found = {name: _timed(way, own) for name, way in OURS.items()}
    longest = max(ours.cpu for ours in found.values())
    for name, flops in least_flops(own).items():
        if flops / rate < longest:
            found[name] = _timed(PEERS[name], own)
    return found


def _timed(way: Callable[[Drawn], Spectrum], own: Drawn) -> Seconds:
    """Best of up to ten runs, or of as many as :data:`PATIENCE` allows; one is always made."""
    cpu, wall, began = math.inf, math.inf, time.perf_counter()
    for _ in range(10):
        cpu_before, before = time.process_time(), time.perf_counter()
        way(own)
        cpu = min(cpu, time.process_time() - cpu_before)
        wall = min(wall, time.perf_counter() - before)
        if time.perf_counter() - began > PATIENCE:
            break
    return Seconds(cpu, wall)


def slower(found: dict[str, Seconds], ours: str, clock: str) -> bool:
    """Whether a way of ours took over 10 % and over 2 ms more than the faster peer that was run."""
    peers = [getattr(found[name], clock) for name in PEERS if name in found]
    own = float(getattr(found[ours], clock))
    return bool(peers) and own > min(peers) + max(RELATIVE * min(peers), ABSOLUTE)


def fastest_rate() -> float:
    """Flops that no peer can exceed in a second, by either clock: of all cores, best of ten.

    Taken from CPU seconds, because the wall clock shows less while other processes use the cores.
    """
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    with one_thread():
        for _ in range(10):
            began = time.thread_time()
            left @ right
            best = min(best, time.thread_time() - began)
    return usable_cores() * 2 * 2048**3 / best


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that use a core each as long as the block runs."""
    program = "while True: pass"
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def held_out(cases: int, seed: int, busy: bool) -> None:
    """Draw, measure, and print every case and where ours is slower."""
    console = Console(width=150)
    choose, rate = random.Random(seed), fastest_rate()
    console.print(f"seed {seed}, {torch.get_num_threads()} threads of torch, {rate / 1e9:.0f} GF/s")
    lost: dict[tuple[str, str], list[str]] = {(o, c): [] for o in OURS for c in ("cpu", "wall")}
    with neighbours(2 if busy else 0):
        for _ in range(cases):
            own = draw(choose)
            found = compare(own, rate)
            name = (
                f"{own.d}x{own.k}, {len(own.factors)} clients, rank {own.rank}, width {own.width}"
            )
            times = ", ".join(f"{way} {s.cpu:.3f} ({s.wall:.3f})" for way, s in found.items())
            console.print(f"{name}, {own.spectrum}: {times}")
            for (ours, clock), cells in lost.items():
                if slower(found, ours, clock):
                    cells.append(f"{name}, {own.spectrum}: {times}")
    for (ours, clock), cells in lost.items():
        console.print(f"{ours}, {clock} seconds: slower in {len(cells)} of {cases}")
        for line in cells:
            console.print(f"  {line}")
