"""Ranks per module that are worth most, under memory, upload, download and cap together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from rankfit.adapters.names import Trainable
from rankfit.estimator.memory import Footprint
from rankfit.estimator.round_time import Payload, link_bytes

#: Worth of the units of rank of one module: one number for all, or one for each from the first on.
Worth = float | Sequence[float]
Floats = NDArray[np.float64]

#: Forms that are added at most; each one cuts off an answer that does not fit.
CUTS = 200
#: Segments up to which the integer program is solved; it may take minutes for thousands.
EXACT = 64
#: Share of the live bytes above those of the least ranks that is tried next after a failed replay.
SHRINK = 0.95


@dataclass(frozen=True, eq=False)
class Limit:
    """A linear constraint: Σ price · rank ≤ budget, both in bytes.

    Attributes
    ----------
    prices : Floats
        Bytes per unit of rank of each module: (modules,).
    """

    prices: Floats
    budget: float


@dataclass(frozen=True)
class Allocation:
    """Ranks by module, and what they are worth together."""

    ranks: Mapping[str, int]
    worth: float


def maximise(
    worths: Sequence[Worth], least: int, caps: Sequence[int], limits: Sequence[Limit]
) -> NDArray[np.int64] | None:
    """Ranks of greatest total worth in linear limits: (modules,); None = ``least`` is too much.

    With up to 64 different worths in all, optimal: the integer program is solved to a gap of 0.
    Beyond, the relaxed program is rounded down and filled up: short of the optimum by less than one
    unit of rank per limit (a vertex of the relaxed program has no more fractions than limits).

    Raises
    ------
    ValueError
        For a worth that is negative, not finite, or grows with the rank, or a cap below ``least``.
    """
    segments = [
        segment
        for module, (worth, cap) in enumerate(zip(worths, caps, strict=True))
        for segment in _segments(module, worth, least, cap)
    ]
    spent = [limit.budget - least * limit.prices.sum() for limit in limits]
    if any(rest < 0 for rest in spent):
        return None
    ranks = np.full(len(caps), least, dtype=np.int64)
    if not segments:
        return ranks
    modules = np.array([segment.module for segment in segments])
    gains = np.array([segment.worth for segment in segments])
    units = np.array([segment.units for segment in segments])
    if not limits:
        taken = units
    else:
        # Scaled to the largest price: bytes as they are would be lost in the solver's tolerances.
        rows = np.array([limit.prices[modules] for limit in limits])
        scale = np.maximum(rows.max(axis=1), 1.0)
        rows, budgets = rows / scale[:, None], np.array(spent) / scale
        taken = (_exact if len(segments) <= EXACT else _rounded)(gains, units, rows, budgets)
    np.add.at(ranks, modules, taken)
    return ranks


def _exact(
    gains: Floats, units: NDArray[np.int64], rows: Floats, budgets: Floats
) -> NDArray[np.int64]:
    """Units of each segment, by the integer program, to a gap of 0."""
    result = milp(
        -gains,
        constraints=[LinearConstraint(rows, ub=budgets)],
        integrality=np.ones(len(gains)),
        bounds=Bounds(0, units),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the integer program of the ranks was not solved: {result.message}")
    taken: NDArray[np.int64] = np.rint(result.x).astype(np.int64)
    return taken


def _rounded(
    gains: Floats, units: NDArray[np.int64], rows: Floats, budgets: Floats
) -> NDArray[np.int64]:
    """Units of each segment, from the relaxed program: rounded down, then filled up greedily."""
    result = milp(-gains, constraints=[LinearConstraint(rows, ub=budgets)], bounds=Bounds(0, units))
    if result.x is None:
        raise RuntimeError(f"the relaxed program of the ranks was not solved: {result.message}")
    taken: NDArray[np.int64] = np.floor(result.x + 1e-9).astype(np.int64)
    left = budgets - rows @ taken
    for segment in np.argsort(-gains, kind="stable"):
        if (left < rows.min(axis=1)).any():
            break
        more = np.floor((left + 1e-12) / np.maximum(rows[:, segment], 1e-12)).min()
        more = int(min(more, units[segment] - taken[segment]))
        taken[segment] += more
        left -= more * rows[:, segment]
    return taken


@dataclass(frozen=True)
class _Segment:
    """Units of rank of one module that are worth the same."""

    module: int
    worth: float
    units: int


def _segments(module: int, worth: Worth, least: int, cap: int) -> list[_Segment]:
    if cap < least:
        raise ValueError(f"the cap of module {module} is {cap}; expected at least {least}")
    units = [worth] * cap if isinstance(worth, int | float) else list(worth)[:cap]
    if not np.isfinite(units).all() or any(unit < 0 for unit in units):
        raise ValueError(f"worth of module {module} is {worth!r}; expected finite numbers above 0")
    if any(b > a for a, b in zip(units, units[1:], strict=False)):
        raise ValueError(f"worth of module {module} grows with the rank; expected it to fall")
    return [_Segment(module, value, len(list(alike))) for value, alike in groupby(units[least:])]


def best_ranks(
    footprint: Footprint,
    payload: Payload,
    worths: Mapping[str, Worth],
    *,
    budget_bytes: int,
    cap: int,
    least: int = 1,
    upload: tuple[float, float] = (0.0, 0.0),
    download: tuple[float, float] = (0.0, 0.0),
    phases: Sequence[Trainable] = ("both",),
) -> Allocation | None:
    """Ranks of greatest total worth that one device can train; None = not even ``least``.

    On a CPU as good as :func:`maximise`. On a GPU so in live bytes; as the allocator reserves more
    than that, the budget of live bytes is lowered until a replay survives: safe, at the cost of
    some rank.
    Modules keep at least rank ``least`` ≥ 1: leaving an adapter out changes the trace.

    Parameters
    ----------
    budget_bytes : int
        What the training process may take, CUDA context included.
    upload, download : tuple of float
        Seconds allowed and Mbps; a 0 = no bound.
    """
    modules = footprint.traces[0].modules
    if set(worths) != set(modules):
        odd = sorted(set(worths) ^ set(modules))
        raise ValueError(f"worths are given for other modules than are adapted: {odd[:4]}")
    limits = _links(payload, modules, upload, download, phases)
    caps = [min(cap, *payload.shapes[module]) for module in modules]
    values = [worths[module] for module in modules]
    live_budget = budget_bytes - footprint.calibration.outside
    cuts: list[Limit] = []
    for _ in range(CUTS):
        solution = maximise(values, least, caps, [*limits, *_memory(cuts, live_budget)])
        if solution is None:
            return None
        ranks = dict(zip(modules, solution.tolist(), strict=True))
        if footprint.live(ranks) > live_budget:
            cuts.append(_cut(footprint, ranks))
        elif footprint.holds(ranks, 0, budget_bytes):
            return Allocation(ranks, _worth(values, solution))
        else:
            floor = footprint.live(least)
            slack = int(SHRINK * (footprint.live(ranks) - floor))
            if slack == 0:
                return None
            live_budget = floor + slack
    return None


def _memory(cuts: Sequence[Limit], live_budget: int) -> list[Limit]:
    return [Limit(cut.prices, live_budget - cut.budget) for cut in cuts]


def _cut(footprint: Footprint, ranks: Mapping[str, int]) -> Limit:
    """The form that peaks at these ranks; its ``budget`` is what it takes at rank 0."""
    row = footprint.peak_row(ranks)
    count = len(ranks)
    terms = footprint.calibration
    fixed = row[0] + row[-2] * terms.cublas_workspace + row[-1] * terms.attention_scratch
    return Limit(row[1 : 1 + count].astype(float), float(fixed))


def _links(
    payload: Payload,
    modules: Sequence[str],
    upload: tuple[float, float],
    download: tuple[float, float],
    phases: Sequence[Trainable],
) -> list[Limit]:
    limits = []
    for (seconds, mbps), moves_of in ((upload, phases), (download, ("both",))):
        if seconds == 0 or mbps == 0:
            continue
        for trainable in moves_of:
            prices = [float(payload.direction_bytes(module, trainable)) for module in modules]
            budget = link_bytes(seconds, mbps) - payload.head_bytes
            limits.append(Limit(np.array(prices), budget))
    return limits


def _worth(worths: Sequence[Worth], ranks: NDArray[np.int64]) -> float:
    return float(
        sum(
            worth * rank if isinstance(worth, int | float) else sum(list(worth)[:rank])
            for worth, rank in zip(worths, ranks.tolist(), strict=True)
        )
    )
