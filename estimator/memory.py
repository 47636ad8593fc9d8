"""The memory of one step of the plan search on one kind of device, over all phases of a method."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankfit.estimator.allocator import Replay, replay
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.trace import Breakdown, Ranks, Trace


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

    @property
    def reserves(self) -> bool:
        """Whether reserved memory decides (a GPU), not live bytes (a CPU)."""
        return self.traces[0].spec.accelerator == "cuda"

    def live(self, ranks: Ranks, tail_ranks: Ranks = 0) -> int:
        """Peak of live bytes over the phases."""
        return max(
            trace.peak_live(ranks, tail_ranks=tail_ranks, calibration=self.calibration)
            + self._resting(trace, ranks, tail_ranks)
            for trace in self.traces
        )

    def replays(
        self, ranks: Ranks, tail_ranks: Ranks = 0, *, cap_bytes: int | None = None
    ) -> list[Replay]:
        """Replay of each phase; ``cap_bytes`` is the allocator's, without the context."""
        results = []
        for trace in self.traces:
            sizes = trace.sizes @ trace.point(ranks, tail_ranks, self.calibration)
            resting = self._resting(trace, ranks, tail_ranks)
            # The resting state is there before all else.
            results.append(
                replay([*sizes.tolist(), resting], [len(sizes), *trace.events.tolist()], cap_bytes)
            )
        return results

    def expected(self, ranks: Ranks, tail_ranks: Ranks, budget_bytes: int) -> int:
        """Peak of the training process in bytes, CUDA context included."""
        if not self.reserves:
            return self.live(ranks, tail_ranks)
        cap = budget_bytes - self.calibration.context
        replays = self.replays(ranks, tail_ranks, cap_bytes=cap if cap > 0 else None)
        if not all(result.survived for result in replays):
            replays = self.replays(ranks, tail_ranks)
        return self.calibration.context + max(result.reserved for result in replays)

    def holds(self, ranks: Ranks, tail_ranks: Ranks, budget_bytes: int) -> bool:
        """Say whether these ranks train within a budget."""
        cap = budget_bytes - self.calibration.context
        if cap <= 0 or self.live(ranks, tail_ranks) > cap:
            return False
        return not self.reserves or all(
            result.survived for result in self.replays(ranks, tail_ranks, cap_bytes=cap)
        )

    def largest(self, limit: int, budget_bytes: int, *, total_rank: int = 0) -> int:
        """Largest rank up to ``limit``, the same in every module, within a budget; 0 = none.

        Reserved memory is not monotone in the rank: the search starts at the bound from live bytes
        and goes down one by one.

        Parameters
        ----------
        total_rank : int
            Rank of the trained adapter and the frozen tail together; 0 = no tail.
        """
        live = self._live_up_to(limit, total_rank)
        candidates = np.flatnonzero(live <= budget_bytes - self.calibration.context) + 1
        for rank in reversed(candidates.tolist()):
            if not self.reserves or self.holds(rank, _tail(rank, total_rank), budget_bytes):
                return int(rank)
        return 0

    def breakdown(self, ranks: Ranks, tail_ranks: Ranks = 0) -> Breakdown:
        """Categories of the phase that takes most."""
        return max(
            (
                trace.breakdown(ranks, tail_ranks=tail_ranks, calibration=self.calibration)
                for trace in self.traces
            ),
            key=lambda breakdown: breakdown.total,
        )

    def _live_up_to(self, limit: int, total_rank: int) -> NDArray[np.int64]:
        """Peak of live bytes at the ranks 1 … limit: (limit,)."""
        ranks = range(1, limit + 1)
        live = np.zeros(len(ranks), dtype=np.int64)
        for trace in self.traces:
            points = np.array(
                [trace.point(r, _tail(r, total_rank), self.calibration) for r in ranks]
            ).reshape(len(ranks), trace.peaks.shape[1])  # (limit, variables)
            own = (points @ trace.peaks.T).max(axis=1, initial=0)
            live = np.maximum(live, own + points @ self._resting_state(trace))
        return live

    def _resting(self, trace: Trace, ranks: Ranks, tail_ranks: Ranks) -> int:
        """Bytes of optimizer state of the factors that only other phases move."""
        return int(self._resting_state(trace) @ trace.point(ranks, tail_ranks, self.calibration))

    def _resting_state(self, trace: Trace) -> NDArray[np.int64]:
        """Coefficients of that state: (variables,). Heads move in every phase: constants cancel."""
        whole = [each.optimizer for each in self.traces if each.spec.moves == "both"]
        kept = whole[0] if whole else np.sum([each.optimizer for each in self.traces], axis=0)
        state: NDArray[np.int64] = kept - trace.optimizer
        state[0] = 0
        return state


def _tail(rank: int, total_rank: int) -> int:
    return max(0, total_rank - rank)


def tail_ranks(ranks: Mapping[str, int], total_rank: int) -> dict[str, int]:
    """Rank of the frozen tail of each module beside its trained rank; 0 = no tail."""
    return {module: _tail(rank, total_rank) for module, rank in ranks.items()}
