"""The plan search: from a device report to a plan, or to the reason why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from transformers import PreTrainedConfig

from rankfit.adapters.names import Trainable
from rankfit.configs.learning import BITS, TORCH_ADAMW
from rankfit.configs.settings import ConfigError, RunSettings, split_list
from rankfit.estimator.calibration import Calibration, Profile
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.memory import Footprint, remainder_ranks
from rankfit.estimator.meta_kernels import kernel_family
from rankfit.estimator.plan import Binding, Plan
from rankfit.estimator.round_time import Payload, Throughput, Work, even_rank, work_of
from rankfit.estimator.step_spec import InputSpec, StepSpec, canonical, inputs_of
from rankfit.estimator.trace import Breakdown, Ranks
from rankfit.estimator.tracer import TraceCache
from rankfit.tasks import base_model
from rankfit.tasks.kronecker import wrap


@dataclass(frozen=True)
class Step:
    """One step of the plan search; every step has the same effective batch."""

    micro_batch: int
    accumulation: int
    checkpointing: bool
    precision: str = "fp32"

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The step that a plan is at."""
        return cls(plan.micro_batch, plan.accumulation, plan.checkpointing, plan.precision)

    def __str__(self) -> str:
        text = f"micro-batch {self.micro_batch}"
        text += " with checkpointing" if self.checkpointing else ""
        return f"{text}, {self.precision} base"


def steps(settings: RunSettings, *, can_checkpoint: bool, group_size: int = 1) -> list[Step]:
    """Steps that the run config allows, in their order.

    As configured, smaller micro-batches, checkpointing, and then the same in each lower precision
    of the frozen base that ``plan.precisions`` names.

    Of ``group_size`` processes that share each batch, each takes a part, rounded up.

    Checkpointing starts again at the whole batch: it costs the same time at any micro-batch, and a
    small micro-batch costs more.
    """
    search = split_list(settings.plan.search)
    batch = -(-settings.train.batch_size // group_size)
    sizes = halvings(batch) if "micro-batch" in search else [batch]
    checkpointing = [settings.train.gradient_checkpointing]
    if "checkpointing" in search and can_checkpoint and True not in checkpointing:
        checkpointing.append(True)
    own = settings.model.base_precision
    lower = [each for each in split_list(settings.plan.precisions) if BITS[each] < BITS[own]]
    return [
        Step(size, batch // size, each, precision)
        for precision in (own, *lower)
        for each in checkpointing
        for size in sizes
    ]


def halvings(batch: int) -> list[int]:
    """Micro-batches to try: divisors of the batch, each at most half of the one before."""
    sizes = [batch]
    for size in range(batch // 2, 0, -1):
        if batch % size == 0 and size <= sizes[-1] // 2:
            sizes.append(size)
    return sizes


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
        The constraint that leaves nothing: memory, upload, download, time or precision.
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
    phases: tuple[Trainable, ...],
    upload: int | None,
) -> NothingFits:
    """A link on which the least rank does not travel in time; ``upload`` = its bound."""
    least, plan = settings.plan.min_rank, settings.plan
    slow: Binding = "upload" if upload is not None and upload < least else "download"
    mbps = report.upload_mbps if slow == "upload" else report.download_mbps
    seconds = plan.upload_seconds if slow == "upload" else plan.download_seconds
    per_rank = payload.bytes_per_rank()
    if slow == "upload":
        per_rank = max(payload.bytes_per_rank(trainable) for trainable in phases)
    need = payload.head_bytes + least * per_rank
    reason = (
        f"rank {least} is {need} bytes to {slow}, which takes {need * 8e-6 / mbps:.2f} s at "
        f"{mbps:g} Mbps; plan.{slow}-seconds allows {seconds:g}"
    )
    return NothingFits(report.client, slow, reason, 0, report.budget_bytes)


def lacks_bf16(report: DeviceReport) -> bool:
    """Whether a device is a GPU older than those with bf16 arithmetic (compute capability 8.0)."""
    major = report.compute_capability.partition(".")[0]
    return report.accelerator == "cuda" and major.isascii() and major.isdigit() and int(major) < 8


def no_bf16(report: DeviceReport, settings: RunSettings) -> NothingFits:
    """A GPU without bf16, in a run whose base or autocast is bf16."""
    setting = "train.autocast" if settings.train.autocast == "bf16" else "model.precision"
    reason = (
        f"{report.name or 'this GPU'} has compute capability {report.compute_capability} and no "
        f"bf16, which begins at 8.0; set {setting} to fp16"
    )
    return NothingFits(report.client, "precision", reason, 0, report.budget_bytes)


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


def too_late(
    report: DeviceReport, settings: RunSettings, work: Work, throughput: Throughput
) -> NothingFits:
    """A device too slow to train the least rank in time; ``work`` of its least step."""
    least, allowed = settings.plan.min_rank, settings.plan.deadline_seconds
    takes = throughput.seconds(work.flops(least))
    reason = (
        f"{throughput.examples} samples at rank {least} take {takes:.1f} s at its measured "
        f"{throughput.flops_per_second / 1e9:.1f} GFLOP/s; plan.deadline-seconds allows {allowed:g}"
    )
    return NothingFits(report.client, "time", reason, 0, report.budget_bytes)


__all__ = ["MIB", "Estimate", "Estimator", "NothingFits", "inputs_of"]


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
        ``lora.rank`` is the cap; ``train``, ``plan`` and ``method.remainder`` say what is allowed.
    phases : sequence of {"both", "a", "b"}
        What is trained in the rounds of the method; a plan holds in each of them.
    can_checkpoint : bool
        Whether the model offers gradient checkpointing.
    traces : TraceCache, optional
        Shared with other estimators.

    Raises
    ------
    ConfigError
        If ``plan.min-rank`` is above ``lora.rank``, or the profile of terms cannot be used.
    """

    def __init__(
        self,
        spec: StepSpec,
        payload: Payload,
        settings: RunSettings,
        *,
        phases: Sequence[Trainable] = ("both",),
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
        self.profile = Profile.load(settings.plan.calibration)
        self.steps = steps(settings, can_checkpoint=can_checkpoint)
        self._can_checkpoint = can_checkpoint
        self._group_steps = {1: self.steps}
        self.traces = TraceCache() if traces is None else traces
        self._footprints: dict[tuple[StepSpec, Calibration], Footprint] = {}
        self._works: dict[bool, Work] = {}
        #: The same where every module has an adapter, without the cost of a spec for each device.
        self._whole: dict[tuple[str, Step, bool, Calibration], Footprint] = {}

    def steps_on(self, report: DeviceReport) -> list[Step]:
        """Steps of the search on a device, in their order; ``steps`` are those of one process.

        None in bf16 on a GPU that has no such numbers.
        """
        size = report.group_size
        if size not in self._group_steps:
            self._group_steps[size] = steps(
                self.settings, can_checkpoint=self._can_checkpoint, group_size=size
            )
        ways = self._group_steps[size]
        if not lacks_bf16(report):
            return ways
        return [step for step in ways if step.precision != "bf16"]

    @classmethod
    def for_run(
        cls,
        settings: RunSettings,
        config: PreTrainedConfig,
        inputs: Sequence[InputSpec],
        *,
        phases: Sequence[Trainable] = ("both",),
        whole_head: bool = False,
        traces: TraceCache | None = None,
        kind: base_model.Kind | None = None,
    ) -> Self:
        """Build the estimator of a run; no weights are read.

        Parameters
        ----------
        config : PreTrainedConfig
            Of the base model, with the run's number of classes.
        inputs : sequence of InputSpec
            Batch of the task for one sample, labels included (see :func:`inputs_of`).
        whole_head : bool
            Whether Adam keeps one second moment for each tensor of the head, as the method's rates
            say (:class:`rankfit.adapters.names.Rates`).
        kind : str, optional
            Kind of model, where there is no task for it yet (default: the run's task).

        Raises
        ------
        ModelError
            If the model cannot be built or the targets match nothing.
        """
        kind = kind or settings.task.kind
        base = base_model.build_empty(
            config,
            kind,
            attention=settings.model.attention,
            precision=settings.model.precision,
        )
        targets = base_model.target_modules(base, settings.lora.targets)
        if settings.lora.form == "kronecker":
            wrap(base, targets)
            targets = base_model.target_modules(base, settings.lora.targets)
        heads = base_model.whole_modules(base, settings.head)
        adam = settings.train.optimizer in TORCH_ADAMW
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
            quantization=settings.model.quantization,
            optimizer=settings.train.optimizer,
            momentum=settings.train.momentum if settings.train.optimizer == "sgd" else 0.0,
            autocast=settings.train.autocast,
            checkpointing=settings.train.gradient_checkpointing,
            dropout=settings.lora.dropout,
            clips=settings.train.max_grad_norm > 0,
            whole_head=adam and whole_head,
        )
        return cls(
            spec,
            Payload.of(
                base, targets, base_model.shared_heads(base, settings.head), settings.wire.dtype
            ),
            settings,
            phases=phases,
            can_checkpoint=bool(base.supports_gradient_checkpointing),
            traces=traces,
        )

    def during(self, phases: Sequence[Trainable]) -> "Estimator":
        """The estimator of another stage of the run: the same step and traces, other phases."""
        if tuple(phases) == self.phases:
            return self
        return Estimator(
            self.spec, self.payload, self.settings, phases=phases,
            can_checkpoint=self._can_checkpoint, traces=self.traces,
        )  # fmt: skip

    def fit(
        self,
        report: DeviceReport,
        *,
        remainder: bool | None = None,
        calibration: Calibration | None = None,
        extra_bytes: int = 0,
        throughput: Throughput | None = None,
    ) -> Estimate | NothingFits:
        """Plan for one device: the first step at which ``plan.min-rank`` fits, at its largest rank.

        Parameters
        ----------
        remainder : bool, optional
            Whether the directions that are not trained come along, frozen, where that fits (None =
            as ``method.remainder`` says).
        calibration : Calibration, optional
            In place of the terms that follow from the report.
        extra_bytes : int
            Kept free beside ``plan.margin-mib``: what this client was measured to take above its
            estimate.
        throughput : Throughput, optional
            What this client's rounds were measured to take; ``plan.deadline-seconds`` needs it.
        """
        settings = self.settings
        if extra_bytes < 0:
            raise ValueError(f"extra_bytes is {extra_bytes}; expected bytes of 0 or more")
        terms = self.profile.calibration(report) if calibration is None else calibration
        budget = self._budget(report) - extra_bytes
        upload = self.payload.upload_bound(
            settings.plan.upload_seconds, report.upload_mbps, self.phases
        )
        download = self.payload.download_bound(settings.plan.download_seconds, report.download_mbps)
        cap, least = settings.lora.rank, settings.plan.min_rank
        limit = min(value for value in (upload, download, cap) if value is not None)
        if limit < least:
            return too_slow(report, settings, self.payload, self.phases, upload)
        wanted = settings.method.remainder if remainder is None else remainder
        remainder = wanted and (download is None or download >= cap)
        late: Step | None = None
        ways = self.steps_on(report)
        if not ways or (settings.train.autocast == "bf16" and lacks_bf16(report)):
            return no_bf16(report, settings)
        for position, step in enumerate(ways):
            time = self.time_bound(step, throughput)
            if time is not None and time < least:
                late = late or step
                continue
            most = limit if time is None else min(limit, time)
            rank, total = self._largest(report, terms, step, most, budget, remainder)
            if rank < least:
                continue
            bounds = Bounds(rank, upload, download, cap, time)
            ranks = dict.fromkeys(self.spec.targets, rank)
            plan = self._plan(report, terms, step, ranks, total, budget, bounds.binding(most))
            footprint = self.footprint(report, step, None, total > 0, terms)
            allocator = max(1, budget - terms.outside)
            split = footprint.breakdown(rank, max(0, total - rank), cap_bytes=allocator)
            return Estimate(report.client, plan, bounds, split, tuple(ways[:position]))
        if late is not None and throughput is not None:
            return too_late(report, settings, self.work(late), throughput)
        needs = self.needs(report, calibration=terms)
        return too_large(report, least, needs, report.budget_bytes - budget)

    def work(self, step: Step) -> Work:
        """FLOPs of a step for one sample, the most over the phases."""
        if step.checkpointing not in self._works:
            spec = replace(self.spec, checkpointing=step.checkpointing)
            phases = [replace(spec, trainable=trainable) for trainable in self.phases]
            self._works[step.checkpointing] = Work.most(work_of(phase) for phase in phases)
        return self._works[step.checkpointing]

    def time_bound(self, step: Step, throughput: Throughput | None) -> int | None:
        """Largest rank that is trained within ``plan.deadline-seconds``; None = no bound."""
        deadline = self.settings.plan.deadline_seconds
        if throughput is None or deadline == 0:
            return None
        return throughput.bound(self.work(step), deadline)

    def flops(self, plan: Plan) -> float:
        """FLOPs of a plan for one sample."""
        step = Step.of(plan)
        return self.work(step).flops(even_rank(plan.ranks, self.payload.shapes))

    def needs(
        self, report: DeviceReport, *, calibration: Calibration | None = None
    ) -> dict[Step, int]:
        """Least bytes in which the least rank trains on a device, in each step of the search."""
        least = self.settings.plan.min_rank
        return {
            step: self.footprint(report, step, calibration=calibration).needed(least)
            for step in self.steps_on(report)
        }

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
        step = Step.of(plan)
        adapted = {module: rank for module, rank in named.items() if rank > 0}
        total = self.settings.lora.rank if plan.remainder_rank else 0
        terms, budget = self.profile.calibration(report), self._budget(report)
        return self._plan(report, terms, step, adapted, total, budget, "method")

    def footprint(
        self,
        report: DeviceReport,
        step: Step,
        ranks: Mapping[str, int] | None = None,
        remainder: bool = False,
        calibration: Calibration | None = None,
    ) -> Footprint:
        """Memory model of a step on a device; modules without a rank are left without adapter."""
        terms = self.profile.calibration(report) if calibration is None else calibration
        on_gpu = report.accelerator == "cuda"
        family = kernel_family(report.compute_capability) if on_gpu else ""
        whole = (report.accelerator + family, step, remainder, terms)
        if ranks is None and whole in self._whole:
            return self._whole[whole]
        model = self.settings.model.at(step.precision)
        targets = tuple(t for t in self.spec.targets if ranks is None or ranks.get(t, 0) > 0)
        base = replace(
            self.spec,
            accelerator=report.accelerator,
            family=family,
            targets=targets,
            micro_batch=step.micro_batch,
            accumulates=step.accumulation > 1,
            checkpointing=step.checkpointing,
            precision=model.precision,
            quantization=model.quantization,
            remainder=remainder,
        )
        key = (base, terms)
        if key not in self._footprints:
            traces = tuple(
                self.traces(replace(base, trainable=trainable, padded=padded))
                for trainable in self.phases
                for padded in paddings(base)
            )
            self._footprints[key] = Footprint(traces, terms)
        if ranks is None:
            self._whole[whole] = self._footprints[key]
            cap = self.settings.lora.rank
            self._footprints[key].prepare(cap - 1 if remainder else cap, cap if remainder else 0)
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
        remainder: bool,
    ) -> tuple[int, int]:
        """Largest rank of a step, and the total rank with a remainder (0 = without)."""
        cap, least = self.settings.lora.rank, self.settings.plan.min_rank
        alone = self.footprint(report, step, calibration=terms).largest(limit, budget)
        if not remainder or alone in (0, cap):
            return alone, 0
        beside = self.footprint(report, step, remainder=True, calibration=terms).largest(
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
        binding: Binding,
    ) -> Plan:
        remainders: Ranks = remainder_ranks(ranks, total) if total else 0
        remainder = not isinstance(remainders, int) and any(remainders.values())
        even = len(ranks) == len(self.spec.targets) and len(set(ranks.values())) == 1
        footprint = self.footprint(report, step, None if even else ranks, remainder, terms)
        return Plan(
            ranks=dict(ranks),
            trainable=self.phases[0],
            micro_batch=step.micro_batch,
            accumulation=step.accumulation,
            checkpointing=step.checkpointing,
            peak_bytes=footprint.expected(ranks, remainders, budget),
            budget_bytes=report.budget_bytes,
            binding=binding,
            remainder_rank=total if remainder else 0,
            precision=step.precision,
            outside_bytes=terms.outside,
        )


def paddings(spec: StepSpec) -> tuple[bool, ...]:
    """What batches may be: on a GPU another attention kernel runs where none holds padding."""
    texts = any(item.name == "attention_mask" for item in spec.inputs)
    both = spec.accelerator == "cuda" and spec.attention == "sdpa" and texts and spec.padded
    return (True, False) if both else (spec.padded,)


def _check_ranks(ranks: Mapping[str, int], targets: Sequence[str]) -> None:
    for module, rank in ranks.items():
        if module not in targets:
            raise ValueError(f"{module!r} takes no adapter in this run; see lora.targets")
        if rank < 0:
            raise ValueError(f"rank of {module!r} is {rank}; expected 0 or more")
    if not any(ranks.values()):
        raise ValueError("no rank is above 0; leave the client out of the round instead")
