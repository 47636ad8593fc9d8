"""What fits: from a device report to a plan, or to the reason why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from transformers import PreTrainedConfig

from rankfit.adapters.names import Moves
from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.memory import Footprint, tail_ranks
from rankfit.estimator.network import Payload
from rankfit.estimator.plan import Binding, Plan
from rankfit.estimator.report import DeviceReport
from rankfit.estimator.search import Step, steps
from rankfit.estimator.spec import InputSpec, Kind, StepSpec, canonical
from rankfit.estimator.trace import Breakdown
from rankfit.estimator.tracer import TraceCache
from rankfit.tasks import models
from rankfit.tasks.task import TensorSpec

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


@dataclass(frozen=True)
class Estimate:
    """A plan and what it rests on, for the table of plans."""

    client: str
    plan: Plan
    bounds: Bounds
    breakdown: Breakdown


@dataclass(frozen=True)
class NothingFits:
    """A device that is left out, and why.

    Attributes
    ----------
    binding : str
        The constraint that leaves nothing: memory, upload or download.
    needs_bytes, budget_bytes : int
        Least memory that any allowed step needs (0 when memory is not the reason), and what the
        device has.
    """

    client: str
    binding: Binding
    reason: str
    needs_bytes: int
    budget_bytes: int


class Estimator:
    """Plans for the devices of one run. Traces are made once; a further client costs milliseconds.

    Parameters
    ----------
    spec : StepSpec
        The step as configured; the search changes its batch and checkpointing, a report its
        accelerator, the phase what moves.
    payload : Payload
        What travels.
    settings : RunSettings
        ``lora.rank`` is the cap; ``train``, ``plan`` and ``method.tail`` say what is allowed.
    phases : sequence of {"both", "a", "b"}
        What moves in the rounds of the method; a plan holds in each of them.
    can_checkpoint : bool
        Whether the model offers gradient checkpointing.
    traces : TraceCache, optional
        Shared with other estimators.

    Raises
    ------
    ConfigError
        If ``plan.min-rank`` is above ``lora.rank``.
    """

    def __init__(
        self,
        spec: StepSpec,
        payload: Payload,
        settings: RunSettings,
        *,
        phases: Sequence[Moves] = ("both",),
        can_checkpoint: bool = True,
        traces: TraceCache | None = None,
    ) -> None:
        if not phases:
            raise ValueError("phases are empty; expected at least one of both, a, b")
        if settings.plan.min_rank > settings.lora.rank:
            raise ConfigError(
                f"plan.min-rank {settings.plan.min_rank} is above lora.rank {settings.lora.rank}; "
                "set it to at most lora.rank"
            )
        self.spec = spec
        self.payload = payload
        self.settings = settings
        self.phases = tuple(phases)
        self.steps = steps(settings, can_checkpoint=can_checkpoint)
        self.traces = TraceCache() if traces is None else traces
        self._footprints: dict[tuple[StepSpec, Calibration], Footprint] = {}

    @classmethod
    def for_run(
        cls,
        settings: RunSettings,
        config: PreTrainedConfig,
        inputs: Sequence[InputSpec],
        *,
        phases: Sequence[Moves] = ("both",),
        traces: TraceCache | None = None,
        kind: Kind | None = None,
    ) -> Self:
        """Build the estimator of a run; no weights are read.

        Parameters
        ----------
        config : PreTrainedConfig
            Of the base model, with the run's number of classes.
        inputs : sequence of InputSpec
            Batch of the task for one sample, labels included (see :func:`inputs_of`).
        kind : str, optional
            Kind of model, where there is no task for it yet (default: the run's task).

        Raises
        ------
        ModelError
            If the model cannot be built or the targets match nothing.
        """
        kind = kind or settings.task.kind
        base = models.build_empty(
            config,
            kind,
            attention=settings.model.attention,
            precision=settings.model.precision,
        )
        targets = models.target_modules(base, settings.lora.targets)
        heads = models.whole_modules(base, settings.head)
        spec = StepSpec(
            config=canonical(config.to_dict()),
            kind=kind,
            accelerator="cpu",
            targets=targets,
            heads=heads,
            inputs=tuple(inputs),
            micro_batch=settings.train.batch_size,
            attention=settings.model.attention,
            precision=settings.model.precision,
            optimizer=settings.train.optimizer,
            checkpointing=settings.train.gradient_checkpointing,
            dropout=settings.lora.dropout,
            clips=settings.train.max_grad_norm > 0,
        )
        return cls(
            spec,
            Payload.of(
                base, targets, models.shared_heads(base, settings.head), settings.wire.dtype
            ),
            settings,
            phases=phases,
            can_checkpoint=bool(base.supports_gradient_checkpointing),
            traces=traces,
        )

    def fit(
        self,
        report: DeviceReport,
        *,
        calibration: Calibration | None = None,
        extra_bytes: int = 0,
    ) -> Estimate | NothingFits:
        """Plan for one device: the first step at which ``plan.min-rank`` fits, at its largest rank.

        Parameters
        ----------
        calibration : Calibration, optional
            In place of the terms that follow from the report.
        extra_bytes : int
            Kept free beside ``plan.margin-mib``: what this client was measured to take above its
            estimate.
        """
        settings, client = self.settings, report.client
        if extra_bytes < 0:
            raise ValueError(f"extra_bytes is {extra_bytes}; expected bytes of 0 or more")
        terms = Calibration.of(report) if calibration is None else calibration
        budget = self._budget(report) - extra_bytes
        upload = self.payload.upload_bound(
            settings.plan.upload_seconds, report.upload_mbps, self.phases
        )
        download = self.payload.download_bound(settings.plan.download_seconds, report.download_mbps)
        cap, least = settings.lora.rank, settings.plan.min_rank
        limit = min(value for value in (upload, download, cap) if value is not None)
        if limit < least:
            return self._too_slow(report, upload, download)
        tail = settings.method.tail and (download is None or download >= cap)
        for step in self.steps:
            rank, total = self._largest(report, terms, step, limit, budget, tail)
            if rank < least:
                continue
            bounds = Bounds(rank, upload, download, cap)
            binding = _binding(bounds, limit)
            ranks = dict.fromkeys(self.spec.targets, rank)
            plan = self._plan(report, terms, step, ranks, total, budget)
            footprint = self.footprint(report, step, plan.ranks, total > 0, terms)
            split = footprint.breakdown(plan.ranks, tail_ranks(plan.ranks, total))
            return Estimate(client, replace(plan, binding=binding), bounds, split)
        return self._too_large(report, terms, budget)

    def lower(self, report: DeviceReport, plan: Plan, ranks: int | Mapping[str, int]) -> Plan:
        """Give a device other ranks than its largest, at the step of its plan.

        The method's choice (``binding`` becomes ``method``); 0 leaves a module without adapter.

        Raises
        ------
        ValueError
            If no rank is above 0, one is negative, or a module is not adapted in this run.
        """
        named = dict.fromkeys(self.spec.targets, ranks) if isinstance(ranks, int) else dict(ranks)
        _check_ranks(named, self.spec.targets)
        step = Step(plan.micro_batch, plan.accumulation, plan.checkpointing)
        adapted = {module: rank for module, rank in named.items() if rank > 0}
        total = self.settings.lora.rank if plan.tail_rank else 0
        lowered = self._plan(
            report, Calibration.of(report), step, adapted, total, self._budget(report)
        )
        return replace(lowered, binding="method")

    def footprint(
        self,
        report: DeviceReport,
        step: Step,
        ranks: Mapping[str, int] | None = None,
        tail: bool = False,
        calibration: Calibration | None = None,
    ) -> Footprint:
        """Memory model of a step on a device; modules without a rank are left without adapter."""
        targets = tuple(t for t in self.spec.targets if ranks is None or ranks.get(t, 0) > 0)
        base = replace(
            self.spec,
            accelerator=report.accelerator,
            targets=targets,
            micro_batch=step.micro_batch,
            accumulates=step.accumulation > 1,
            checkpointing=step.checkpointing,
            tail=tail,
        )
        terms = Calibration.of(report) if calibration is None else calibration
        key = (base, terms)
        if key not in self._footprints:
            traces = tuple(self.traces(replace(base, moves=moves)) for moves in self.phases)
            self._footprints[key] = Footprint(traces, terms)
        return self._footprints[key]

    def _budget(self, report: DeviceReport) -> int:
        return report.budget_bytes - int(self.settings.plan.margin_mib * MIB)

    def _largest(
        self,
        report: DeviceReport,
        terms: Calibration,
        step: Step,
        limit: int,
        budget: int,
        tail: bool,
    ) -> tuple[int, int]:
        """Largest rank of a step, and the total rank with a tail (0 = without)."""
        cap, least = self.settings.lora.rank, self.settings.plan.min_rank
        alone = self.footprint(report, step, calibration=terms).largest(limit, budget)
        if not tail or alone in (0, cap):
            return alone, 0
        beside = self.footprint(report, step, tail=True, calibration=terms).largest(
            min(limit, cap - 1), budget, total_rank=cap
        )
        return (beside, cap) if beside >= least else (alone, 0)

    def _plan(
        self,
        report: DeviceReport,
        terms: Calibration,
        step: Step,
        ranks: Mapping[str, int],
        total: int,
        budget: int,
    ) -> Plan:
        tails = tail_ranks(ranks, total)
        tail = any(tails.values())
        footprint = self.footprint(report, step, ranks, tail, terms)
        return Plan(
            ranks=dict(ranks),
            moves=self.phases[0],
            micro_batch=step.micro_batch,
            accumulation=step.accumulation,
            checkpointing=step.checkpointing,
            peak_bytes=footprint.expected(ranks, tails, budget),
            budget_bytes=report.budget_bytes,
            binding="cap",
            tail_rank=total if tail else 0,
        )

    def _too_slow(
        self, report: DeviceReport, upload: int | None, download: int | None
    ) -> NothingFits:
        least, plan = self.settings.plan.min_rank, self.settings.plan
        slow: Binding = "upload" if upload is not None and upload < least else "download"
        mbps = report.upload_mbps if slow == "upload" else report.download_mbps
        seconds = plan.upload_seconds if slow == "upload" else plan.download_seconds
        per_rank = self.payload.bytes_per_rank()
        if slow == "upload":
            per_rank = max(self.payload.bytes_per_rank(moves) for moves in self.phases)
        need = self.payload.head_bytes + least * per_rank
        reason = (
            f"rank {least} is {need} bytes to {slow}, which takes {need * 8e-6 / mbps:.2f} s at "
            f"{mbps:g} Mbps; plan.{slow}-seconds allows {seconds:g}"
        )
        return NothingFits(report.client, slow, reason, 0, report.budget_bytes)

    def _too_large(self, report: DeviceReport, terms: Calibration, budget: int) -> NothingFits:
        least = self.settings.plan.min_rank
        needs = {
            step: self.footprint(report, step, calibration=terms).expected(least, 0, budget)
            for step in self.steps
        }
        step = min(needs, key=lambda key: needs[key])
        spare = report.budget_bytes - budget
        need = needs[step] + spare
        reason = (
            f"needs {need / MIB:.1f} MiB at rank {least}, {step}; has "
            f"{report.budget_bytes / MIB:.1f} MiB"
        )
        return NothingFits(report.client, "memory", reason, need, report.budget_bytes)


def inputs_of(
    batch: Mapping[str, TensorSpec] | Mapping[str, torch.Tensor],
) -> tuple[InputSpec, ...]:
    """Shapes of one sample from a task's ``example_batch``, or from a real batch."""
    return tuple(
        InputSpec(name, tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in batch.items()
    )


def _binding(bounds: Bounds, limit: int) -> Binding:
    if bounds.memory < limit:
        return "memory"
    if bounds.cap == limit:
        return "cap"
    return "upload" if bounds.upload == limit else "download"


def _check_ranks(ranks: Mapping[str, int], targets: Sequence[str]) -> None:
    for module, rank in ranks.items():
        if module not in targets:
            raise ValueError(f"{module!r} takes no adapter in this run; see lora.targets")
        if rank < 0:
            raise ValueError(f"rank of {module!r} is {rank}; expected 0 or more")
    if not any(ranks.values()):
        raise ValueError("no rank is above 0; leave the client out of the round instead")
