"""What the plan search says of one device: a plan and what it rests on, or why there is none."""

from collections.abc import Mapping
from dataclasses import dataclass

from rankfit.adapters.names import Moves
from rankfit.configs.settings import RunSettings
from rankfit.estimator.network import Payload
from rankfit.estimator.plan import Binding, Plan
from rankfit.estimator.report import DeviceReport
from rankfit.estimator.search import Step
from rankfit.estimator.trace import Breakdown
from rankfit.estimator.work import Pace, Work

MIB = 2**20


@dataclass(frozen=True)
class Bounds:
    """Largest rank by each constraint; None = no bound.

    ``memory`` is not looked for above the others: it is at most the smallest of them.
    """

    memory: int
    upload: int | None
    download: int | None
    cap: int
    time: int | None = None

    def binding(self, limit: int) -> Binding:
        """The constraint that keeps the rank from being larger; ``limit`` = least but memory."""
        if self.memory < limit:
            return "memory"
        if self.cap == limit:
            return "cap"
        if self.time == limit:
            return "time"
        return "upload" if self.upload == limit else "download"


@dataclass(frozen=True)
class Estimate:
    """A plan and what it rests on, for the table of plans.

    Attributes
    ----------
    rejected : tuple of Step
        Cheaper steps of the search at which not even the least rank fits.
    """

    client: str
    plan: Plan
    bounds: Bounds
    breakdown: Breakdown
    rejected: tuple[Step, ...] = ()


@dataclass(frozen=True)
class NothingFits:
    """A device that is left out, and why.

    Attributes
    ----------
    binding : str
        The constraint that leaves nothing: memory, upload, download or time.
    needs_bytes, budget_bytes : int
        Least memory that any allowed step needs (0 when memory is not the reason), and what the
        device has.
    """

    client: str
    binding: Binding
    reason: str
    needs_bytes: int
    budget_bytes: int


def too_slow(
    report: DeviceReport,
    settings: RunSettings,
    payload: Payload,
    phases: tuple[Moves, ...],
    upload: int | None,
) -> NothingFits:
    """A link on which the least rank does not travel in time; ``upload`` = its bound."""
    least, plan = settings.plan.min_rank, settings.plan
    slow: Binding = "upload" if upload is not None and upload < least else "download"
    mbps = report.upload_mbps if slow == "upload" else report.download_mbps
    seconds = plan.upload_seconds if slow == "upload" else plan.download_seconds
    per_rank = payload.bytes_per_rank()
    if slow == "upload":
        per_rank = max(payload.bytes_per_rank(moves) for moves in phases)
    need = payload.head_bytes + least * per_rank
    reason = (
        f"rank {least} is {need} bytes to {slow}, which takes {need * 8e-6 / mbps:.2f} s at "
        f"{mbps:g} Mbps; plan.{slow}-seconds allows {seconds:g}"
    )
    return NothingFits(report.client, slow, reason, 0, report.budget_bytes)


def too_large(
    report: DeviceReport, least: int, needs: Mapping[Step, int], spare_bytes: int
) -> NothingFits:
    """A device that cannot hold the least rank in any step.

    Parameters
    ----------
    needs : Mapping[Step, int]
        Bytes that the least rank takes in each allowed step.
    spare_bytes : int
        What is kept free beside.
    """
    step = min(needs, key=lambda key: needs[key])
    need = needs[step] + spare_bytes
    reason = (
        f"needs {need / MIB:.1f} MiB at rank {least}, {step}; has "
        f"{report.budget_bytes / MIB:.1f} MiB"
    )
    return NothingFits(report.client, "memory", reason, need, report.budget_bytes)


def too_late(report: DeviceReport, settings: RunSettings, work: Work, pace: Pace) -> NothingFits:
    """A device at whose pace the least rank is not trained in time; ``work`` of its least step."""
    least, allowed = settings.plan.min_rank, settings.plan.deadline_seconds
    takes = pace.seconds(work.flops(least))
    reason = (
        f"{pace.examples} samples at rank {least} take {takes:.1f} s at its measured "
        f"{pace.flops_per_second / 1e9:.1f} GFLOP/s; plan.deadline-seconds allows {allowed:g}"
    )
    return NothingFits(report.client, "time", reason, 0, report.budget_bytes)
