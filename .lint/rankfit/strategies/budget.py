"""Keeping a method's choice of ranks within memory, upload and download, whatever it asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rankfit.adapters.names import Moves
from rankfit.estimator.fit import MIB, Estimator
from rankfit.estimator.network import link_bytes
from rankfit.estimator.plan import Plan
from rankfit.estimator.report import DeviceReport
from rankfit.estimator.search import Step
from rankfit.estimator.work import Pace

#: Shares of the ranks asked for that are tried, from all of them down.
_SHARES = [1 - 0.05 * i for i in range(20)]


@dataclass(frozen=True)
class Budget:
    """What one device can hold and move.

    Parameters
    ----------
    estimator : Estimator
        Of the phases of this stage of the run.
    report : DeviceReport
        The device.
    plan : Plan
        What fits at its largest rank in all modules: its micro-batch and checkpointing are kept.
    folded : bool
        Whether a frozen change of the base travels along, of rank up to min(d, k).
    pace : Pace or None
        What its rounds were measured to take (None = not measured, or no deadline).
    """

    estimator: Estimator
    report: DeviceReport
    plan: Plan
    folded: bool
    pace: Pace | None = None

    def fit(self, ranks: Mapping[str, int]) -> Plan | None:
        """The plan at these ranks, or at the largest share of them that fits; None = nothing does.

        A module that is absent or at rank 0 is left without adapter.
        """
        for share in _SHARES:
            asked = {m: int(rank * share + 1e-9) for m, rank in ranks.items()}
            found = self._try({module: rank for module, rank in asked.items() if rank > 0})
            if found is not None:
                return found
        # What fits in all modules fits in some of them.
        return self._try({m: min(rank, self.plan.rank) for m, rank in ranks.items() if rank > 0})

    def upload_bytes(self, ranks: Mapping[str, int], phases: Sequence[Moves]) -> int:
        """Bytes that come back in the largest of the phases, head included."""
        payload = self.estimator.payload
        return payload.head_bytes + max(
            sum(rank * payload.direction_bytes(module, moves) for module, rank in ranks.items())
            for moves in phases
        )

    def download_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes that go out, head and frozen part included."""
        payload, frozen = self.estimator.payload, self.frozen(ranks)
        return payload.head_bytes + sum(
            (ranks.get(module, 0) + frozen.get(module, 0)) * payload.direction_bytes(module)
            for module in payload.shapes
        )

    def frozen(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Largest rank of the frozen directions beside these: the fold's, the tail's, or none."""
        shapes = self.estimator.payload.shapes
        if self.folded:
            return {module: min(shape) for module, shape in shapes.items()}
        if not self.plan.tail_rank:
            return {}
        return {module: max(0, self.plan.tail_rank - ranks.get(module, 0)) for module in shapes}

    @cached_property
    def memory_bytes(self) -> int:
        """Bytes of memory, without the margin that is kept free."""
        return self.report.budget_bytes - int(self.estimator.settings.plan.margin_mib * MIB)

    def _try(self, ranks: Mapping[str, int]) -> Plan | None:
        if not ranks:
            return None
        settings, report = self.estimator.settings.plan, self.report
        up = self.upload_bytes(ranks, self.estimator.phases)
        if not _travels(up, settings.upload_seconds, report.upload_mbps):
            return None
        if not _travels(
            self.download_bytes(ranks), settings.download_seconds, report.download_mbps
        ):
            return None
        if not self._in_time(ranks):
            return None
        whole = set(ranks) == set(self.estimator.spec.targets)
        if not self.folded and whole and set(ranks.values()) == {self.plan.rank}:
            return self.plan
        planned = self._price(ranks, whole)
        return planned if planned.peak_bytes <= self.memory_bytes else None

    def _in_time(self, ranks: Mapping[str, int]) -> bool:
        """Whether these ranks are trained within ``plan.deadline-seconds``."""
        deadline = self.estimator.settings.plan.deadline_seconds
        if self.pace is None or deadline == 0:
            return True
        flops = self.estimator.flops(replace(self.plan, ranks=dict(ranks)))
        return self.pace.seconds(flops) <= deadline

    def _price(self, ranks: Mapping[str, int], whole: bool) -> Plan:
        """The plan at ranks, with its expected peak."""
        frozen = self.frozen(ranks)
        planned = self.estimator.lower(self.report, replace(self.plan, tail_rank=0), ranks)
        if not frozen:
            return planned
        if not self.folded and whole:
            return self.estimator.lower(self.report, self.plan, ranks)
        # The memory model knows no module with a frozen adapter alone: rank 1 stands in for 0.
        stand_in = {m: max(1, ranks.get(m, 0)) for m in self.estimator.spec.targets}
        step = Step.of(planned)
        footprint = self.estimator.footprint(self.report, step, stand_in, tail=True)
        peak = footprint.expected(stand_in, frozen, self.memory_bytes)
        total = max(ranks.get(m, 0) + rank for m, rank in frozen.items())
        return replace(planned, peak_bytes=peak, tail_rank=total)


def _travels(nbytes: int, seconds: float, mbps: float) -> bool:
    """Whether bytes pass a link in time; 0 s or 0 Mbps = no bound."""
    return not seconds or not mbps or nbytes <= link_bytes(seconds, mbps)
