"""The memory of one step of the plan search, and the least under which each rank trains."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rankfit.estimator.allocator import SMALL_SEGMENT, Replay, replay_fast
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.trace import Breakdown, Ranks, Trace

#: Segments are multiples of it, so two caps between the same multiples allow the same.
GRAIN = SMALL_SEGMENT

#: Rank and cap → whether it survives, and how far that answer holds: down to what was reserved, or
#: up to below the least total that was refused.
Attempt = Callable[[int, int], tuple[bool, int]]


class Thresholds:
    """Least surviving cap of the ranks from 1 on.

    The search for a rank begins at the cap of the rank before it, and the ranks always come in the
    same order, so that the answer does not depend on who asks. The allocator is not monotone: at
    some higher cap the rank may fail again, and at some lower one it may by chance survive.

    Parameters
    ----------
    attempt : Attempt
        Replays one rank under one cap.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._caps: list[int] = []

    def up_to(self, live: NDArray[np.int64]) -> NDArray[np.int64]:
        """Least cap of each rank, in bytes: (limit,).

        Parameters
        ----------
        live : NDArray
            Peak of live bytes at the ranks 1 … limit: no cap below it can do. (limit,)
        """
        for rank in range(len(self._caps) + 1, len(live) + 1):
            floor = -(-int(live[rank - 1]) // GRAIN) * GRAIN
            start = max(floor, self._caps[-1]) if self._caps else floor
            self._caps.append(self._search(rank, floor, start))
        return np.array(self._caps[: len(live)], dtype=np.int64)

    def _search(self, rank: int, floor: int, start: int) -> int:
        """Least cap that survives: in steps that double away from ``start``, then halving."""
        survived, bound = self._attempt(rank, start)
        step = GRAIN
        fails, survives = floor - GRAIN, bound
        if survived:
            while survives > floor:
                survived, bound = self._attempt(rank, max(floor, survives - step))
                if not survived:
                    fails = bound - GRAIN
                    break
                survives, step = bound, 2 * step
        else:
            while not survived:
                fails = bound - GRAIN
                survived, bound = self._attempt(rank, fails + step)
                step *= 2
            survives = bound
        while survives - fails > GRAIN:
            middle = fails + (survives - fails) // (2 * GRAIN) * GRAIN
            survived, bound = self._attempt(rank, middle)
            if survived:
                survives = bound
            else:
                fails = bound - GRAIN
        return survives


NEVER = 2**62
#: Vectors of ranks whose replays are kept.
KEPT = 10_000


class Courses:
    """Replays of one step at some ranks, each kept for all the caps under which it is the same."""

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._replays: list[Replay] = []

    def under(self, cap_bytes: int | None) -> Replay | None:
        """The replay under a cap (None = no cap), if one that takes the same course is known."""
        place = bisect_right(self._lows, NEVER if cap_bytes is None else cap_bytes) - 1
        if place < 0 or not self._replays[place].holds_under(cap_bytes):
            return None
        return self._replays[place]

    def add(self, replay: Replay) -> None:
        """Keep a replay."""
        place = bisect_right(self._lows, replay.reserved)
        self._lows.insert(place, replay.reserved)
        self._replays.insert(place, replay)


@dataclass(frozen=True)
class Footprint:
    """Traces of the phases of a method, and the terms of the device.

    A plan must hold in every phase. The optimizer state of a factor that rests in one phase stays
    resident there, so a client may keep it from round to round.

    On a GPU the measure is what the allocator reserves, replayed under the budget, plus the CUDA
    context; on a CPU it is the peak of live bytes.
    """

    traces: tuple[Trace, ...]
    calibration: Calibration = Calibration()
    _courses: dict[object, Courses] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _lives: dict[tuple[int, int], NDArray[np.int64]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _thresholds: dict[int, Thresholds] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _breakdowns: dict[object, Breakdown] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def reserves(self) -> bool:
        """Whether reserved memory decides (a GPU), not live bytes (a CPU)."""
        return self.traces[0].spec.accelerator == "cuda"

    def live(self, ranks: Ranks, remainder_ranks: Ranks = 0) -> int:
        """Peak of live bytes over the phases."""
        return max(
            trace.peak_live(ranks, remainder_ranks=remainder_ranks, calibration=self.calibration)
            + self._resting(trace, ranks, remainder_ranks)
            for trace in self.traces
        )

    def peak_row(self, ranks: Ranks, remainder_ranks: Ranks = 0) -> NDArray[np.int64]:
        """Linear form of the phase that takes most at these ranks: (variables,)."""
        trace = max(
            self.traces,
            key=lambda trace: (
                trace.peak_live(
                    ranks, remainder_ranks=remainder_ranks, calibration=self.calibration
                )
                + self._resting(trace, ranks, remainder_ranks)
            ),
        )
        row = trace.peak_row(ranks, remainder_ranks=remainder_ranks, calibration=self.calibration)
        total: NDArray[np.int64] = row + self._resting_state(trace)
        return total

    def replays(
        self, ranks: Ranks, remainder_ranks: Ranks = 0, *, cap_bytes: int | None = None
    ) -> list[Replay]:
        """Replay of each phase; ``cap_bytes`` is the allocator's, without the context."""
        return [self._replay(phase, ranks, remainder_ranks, cap_bytes) for phase in self._phases]

    def expected(self, ranks: Ranks, remainder_ranks: Ranks, budget_bytes: int) -> int:
        """Peak of the training process in bytes, CUDA context included."""
        if not self.reserves:
            return self.live(ranks, remainder_ranks)
        context, cap = self.calibration.outside, budget_bytes - self.calibration.outside
        if cap > 0:
            # Under a cap the allocator gives cached segments back, and may get by.
            replays = self.replays(ranks, remainder_ranks, cap_bytes=cap)
            if all(result.survived for result in replays):
                return context + max(result.reserved for result in replays)
        return context + max(result.reserved for result in self.replays(ranks, remainder_ranks))

    def holds(self, ranks: Ranks, remainder_ranks: Ranks, budget_bytes: int) -> bool:
        """Say whether these ranks train within a budget."""
        cap = budget_bytes - self.calibration.outside
        if cap <= 0 or self.live(ranks, remainder_ranks) > cap:
            return False
        return not self.reserves or self._survives(ranks, remainder_ranks, cap)

    def largest(self, limit: int, budget_bytes: int, *, total_rank: int = 0) -> int:
        """Largest rank up to ``limit``, the same in every module, within a budget; 0 = none.

        Reserved memory is not monotone in the rank. On a GPU it is the largest rank whose least cap
        (:class:`Thresholds`) the budget reaches and that survives a replay under the budget itself.
        The answer for one device does not depend on which were asked before.

        Parameters
        ----------
        total_rank : int
            Rank of the trained adapter and the frozen remainder together; 0 = no remainder.
        """
        cap = budget_bytes - self.calibration.outside
        fits = self._live_up_to(limit, total_rank) <= cap
        if self.reserves and fits.any():
            fits &= self._caps_up_to(limit, total_rank) <= cap
        candidates = (np.flatnonzero(fits) + 1).tolist()
        if not self.reserves:
            return candidates[-1] if candidates else 0
        survivors = (
            rank
            for rank in reversed(candidates)
            if self._survives(rank, _remainder(rank, total_rank), cap)
        )
        return next(survivors, 0)

    def needed(self, rank: int) -> int:
        """Least bytes of the training process in which a rank trains, CUDA context included."""
        if not self.reserves:
            return self.live(rank)
        return self.calibration.outside + int(self._caps_up_to(rank, 0)[-1])

    def prepare(self, limit: int, total_rank: int = 0) -> None:
        """Work out now what :meth:`largest` would at its first call."""
        self._live_up_to(limit, total_rank)
        if self.reserves:
            self._caps_up_to(limit, total_rank)

    def breakdown(
        self, ranks: Ranks, remainder_ranks: Ranks = 0, *, cap_bytes: int | None = None
    ) -> Breakdown:
        """Categories of the phase that takes most.

        On a GPU in blocks of the allocator, as ``torch.cuda.max_memory_allocated`` counts them:
        what rounding and blocks that are not split add goes to ``forward``. ``cap_bytes`` is the
        allocator's, without the context.
        """
        replays = self.replays(ranks, remainder_ranks, cap_bytes=cap_bytes) if self.reserves else []
        blocks = tuple(replay.allocated for replay in replays)
        key = (self._key(ranks), self._key(remainder_ranks), blocks)
        if key not in self._breakdowns:
            splits = [
                trace.breakdown(
                    ranks, remainder_ranks=remainder_ranks, calibration=self.calibration
                )
                for trace in self.traces
            ]
            if self.reserves:
                splits = [
                    replace(split, forward=split.forward + max(0, taken - split.total))
                    for split, taken in zip(splits, blocks, strict=True)
                ]
            self._breakdowns[key] = max(splits, key=lambda split: split.total)
        return self._breakdowns[key]

    def _live_up_to(self, limit: int, total_rank: int) -> NDArray[np.int64]:
        """Peak of live bytes at the ranks 1 … limit: (limit,)."""
        key = (limit, total_rank)
        if key in self._lives:
            return self._lives[key]
        ranks = np.arange(1, limit + 1)
        points = np.stack([np.ones_like(ranks), ranks, np.maximum(0, total_rank - ranks)])
        live = np.zeros(limit, dtype=np.int64)
        for forms in self._forms:
            live = np.maximum(live, (forms @ points).max(axis=0, initial=0))
        self._lives[key] = live
        return live

    def _caps_up_to(self, limit: int, total_rank: int) -> NDArray[np.int64]:
        """Least cap of the allocator at the ranks 1 … limit, in bytes: (limit,)."""

        def attempt(rank: int, cap_bytes: int) -> tuple[bool, int]:
            remainder, reserved = _remainder(rank, total_rank), 0
            for phase in self._phases:
                replay = self._replay(phase, rank, remainder, cap_bytes)
                if not replay.survived:
                    return False, replay.refused
                reserved = max(reserved, replay.reserved)
            return True, reserved

        if total_rank not in self._thresholds:
            self._thresholds[total_rank] = Thresholds(attempt)
        return self._thresholds[total_rank].up_to(self._live_up_to(limit, total_rank))

    @cached_property
    def _forms(self) -> list[NDArray[np.int64]]:
        """Live bytes of each phase as (bytes, per rank, per remainder rank): (moments, 3)."""
        forms = []
        for trace in self.traces:
            resting, count = self._resting_state(trace), len(trace.modules)
            rest = [0, resting[1 : 1 + count].sum(), resting[1 + count : 1 + 2 * count].sum()]
            forms.append(trace.uniform(self.calibration) + np.array(rest))
        return forms

    def _survives(self, ranks: Ranks, remainder_ranks: Ranks, cap_bytes: int) -> bool:
        return all(
            self._replay(phase, ranks, remainder_ranks, cap_bytes).survived
            for phase in self._phases
        )

    def _replay(
        self, phase: int, ranks: Ranks, remainder_ranks: Ranks, cap_bytes: int | None
    ) -> Replay:
        key = (phase, self._key(ranks), self._key(remainder_ranks))
        if key not in self._courses and len(self._courses) >= KEPT:
            self._courses.clear()
        courses = self._courses.setdefault(key, Courses())
        known = courses.under(cap_bytes)
        if known is None:
            trace = self.traces[phase]
            point = trace.point(ranks, remainder_ranks, self.calibration)
            # The resting state is there before all else.
            resting = int(self._resting_state(trace) @ point)
            known = replay_fast(trace.column, trace.amount, point, trace.events, resting, cap_bytes)
            courses.add(known)
        return known

    @property
    def _phases(self) -> range:
        return range(len(self.traces))

    def _key(self, ranks: Ranks) -> object:
        """The same for one rank in every module, however it is written."""
        if isinstance(ranks, int):
            return ranks
        values = tuple(ranks.values())
        if tuple(ranks) != self.traces[0].modules:
            return tuple(ranks.items())
        return values[0] if len(set(values)) == 1 else values

    def _resting(self, trace: Trace, ranks: Ranks, remainder_ranks: Ranks) -> int:
        """Bytes of optimizer state of the factors that only other phases move."""
        return int(
            self._resting_state(trace) @ trace.point(ranks, remainder_ranks, self.calibration)
        )

    def _resting_state(self, trace: Trace) -> NDArray[np.int64]:
        """Coefficients of that state: (variables,). Heads move in every phase: constants cancel."""
        states = {each.spec.trainable: each.optimizer for each in self.traces}
        kept = states["both"] if "both" in states else np.sum(list(states.values()), axis=0)
        state: NDArray[np.int64] = kept - trace.optimizer
        state[0] = 0
        return state


def _remainder(rank: int, total_rank: int) -> int:
    return max(0, total_rank - rank)


def remainder_ranks(ranks: Mapping[str, int], total_rank: int) -> dict[str, int]:
    """Rank of the frozen remainder of each module beside its trained rank; 0 = no remainder."""
    return {module: _remainder(rank, total_rank) for module, rank in ranks.items()}
