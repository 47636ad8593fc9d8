"""Local training of one client in one round, at the true ranks of its plan."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rankfit.adapters.adapter import Adapter
from rankfit.adapters.names import WHOLE, Rates
from rankfit.client.memory_meter import allocator_limit, meter_of, outside_bytes
from rankfit.client.policy import NotAllowed
from rankfit.client.regularizers import (
    Penalty,
    Proximal,
    RankDecay,
    add_all,
    cut_state,
    pruned_rank,
)
from rankfit.client.workspace import ClientStore, Workspace
from rankfit.configs.protocol import Metric
from rankfit.configs.settings import RunSettings, derive, learning_rate
from rankfit.estimator.plan import Plan
from rankfit.tasks.base_model import DTYPES
from rankfit.tasks.data import DataError
from rankfit.tasks.lora import (
    REMAINDER,
    checkpointing,
    chunks,
    count_targets,
    eject,
    fisher_scores,
    free_cache,
    inject,
    load_adapter,
    place,
    read_state,
    set_training,
    train_only,
)
from rankfit.tasks.optimizers import build_optimizer
from rankfit.tasks.targets import head_tensors

#: (model, batch with labels) → mean loss over the batch.
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def plain(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss: cross entropy, of a regression the squared error."""
    loss: Tensor = model(**inputs).loss
    return loss


def prior_adjusted(labels: Tensor, classes: int, weight: float) -> Loss:
    """Cross entropy of logits + τ·log π, π the client's own label prior (arXiv:2007.07314).

    A client that holds few classes then does not push down the logits of all others. One sample
    is added to each class, so that a class it lacks keeps a finite prior.

    Parameters
    ----------
    labels : Tensor
        Labels of all the client's training samples, (n,) int64.
    weight : float
        τ.
    """
    counts = torch.bincount(labels, minlength=classes).float() + 1
    shift = weight * (counts / counts.sum()).log()  # (classes,)

    def loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        logits = model(**{n: t for n, t in inputs.items() if n != "labels"}).logits
        return cross_entropy(logits.float() + shift.to(logits.device), inputs["labels"])

    return loss


#: Keys of a parameter's state in torch's AdamW.
_STEP, _FIRST, _SECOND = "step", "exp_avg", "exp_avg_sq"
#: Before the names of the counts of steps, among the kept tensors.
_STEPS = "steps/"


def recall(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
) -> None:
    """Let an AdamW that has not stepped yet go on from kept second moments.

    A parameter whose shape has changed, because its plan's rank did, begins anew.

    Parameters
    ----------
    parameters : Mapping[str, nn.Parameter]
        By the names that they are saved by.
    kept : Mapping[str, Tensor]
        What :func:`kept_moments` gave; empty in the first round. On the CPU its second moments are
        taken over, not copied: the estimate has no place for a second set.
    """
    groups = optimizer.param_groups
    whole = {id(each) for group in groups if group.get(WHOLE) for each in group["params"]}
    for name, parameter in parameters.items():
        second = kept.get(name)
        expected = torch.Size() if id(parameter) in whole else parameter.shape
        if second is None or second.shape != expected:
            continue
        # A fused kernel reads the count on the parameter's device, the others on the CPU.
        fused = bool(optimizer.defaults.get("fused"))
        place = parameter.device if fused else torch.device("cpu")
        optimizer.state[parameter] = {
            _STEP: kept[_STEPS + name].to(place, copy=True),
            _FIRST: torch.zeros_like(parameter),
            _SECOND: second.to(parameter),
        }


def kept_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Second moments and counts of steps of the parameters that have moved."""
    kept = {}
    for name, parameter in parameters.items():
        if state := optimizer.state.get(parameter):
            kept[name], kept[_STEPS + name] = state[_SECOND], state[_STEP]
    return kept


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One client's work in one round.

    Attributes
    ----------
    client : str
        Name, from which the client's random numbers derive.
    round : int
        Number of the round, from 1.
    plan : Plan
        What to train and how.
    adapter : Adapter
        As received: at the plan's ranks, or whole when the plan has a remainder.
    samples : NDArray
        Indices into the training split.
    cap_bytes : int or None
        Memory that the process must not exceed: a declared budget is enforced (None = none is).
    own_head : ClientStore or None
        Where the client keeps a head of its own.
    moments : ClientStore or None
        Where it keeps second moments from round to round.
    """

    client: str
    round: int
    plan: Plan
    adapter: Adapter
    samples: NDArray[np.int64]
    cap_bytes: int | None
    own_head: ClientStore | None = None
    moments: ClientStore | None = None


@dataclass(frozen=True)
class Trained:
    """The update: the tensors that moved under PEFT's names, and what was measured."""

    state: Mapping[str, Tensor]
    metrics: Mapping[str, int | float]


def train(workspace: Workspace, job: Job) -> Trained:
    """Train one job; fall back to a smaller one as often as memory runs out.

    Raises
    ------
    torch.OutOfMemoryError
        If not even micro-batch 1 at rank 1 fits.
    """
    if not len(job.samples):
        raise DataError(f"client {job.client!r} has no training samples", fault="data-empty")
    began = time.monotonic()
    plan, failures = job.plan, 0
    while True:
        try:
            state, metrics = _attempt(workspace, job, plan)
            break
        except torch.OutOfMemoryError as error:
            workspace.group.fail(error)
            if workspace.keeps_to_plan and plan.outside_bytes:
                # What was planned is too little for it; the whole budget may do.
                workspace.keeps_to_plan = False
                log.warning("client %s: %s; trying again beyond its plan", job.client, error)
            else:
                smaller = fall_back(plan)
                if smaller is None:
                    raise
                log.warning("client %s: %s; trying again smaller", job.client, error)
                plan, failures = smaller, failures + 1
        # The failed attempt's tensors hang on its traceback, which ends with the except clause.
        free_cache()
    metrics[Metric.TRAIN_SECONDS] = time.monotonic() - began
    if failures:
        metrics |= {Metric.OUT_OF_MEMORY: failures, Metric.MICRO_BATCH: plan.micro_batch}
        if plan.rank < job.plan.rank:
            metrics.setdefault(Metric.RANK_CAP, plan.rank)
    return Trained(state, metrics)


def fall_back(plan: Plan) -> Plan | None:
    """Return the next smaller plan: half the micro-batch, then half the rank; None after rank 1."""
    if plan.micro_batch > 1:
        half = (plan.micro_batch + 1) // 2
        batch = plan.micro_batch * plan.accumulation
        return replace(plan, micro_batch=half, accumulation=-(-batch // half))
    if plan.rank > 1:
        cap = plan.rank // 2
        return replace(plan, ranks={m: min(rank, cap) for m, rank in plan.ranks.items()})
    return None


def evaluate(
    workspace: Workspace,
    adapter: Adapter,
    samples: NDArray[np.int64],
    own_head: Mapping[str, Tensor] | None = None,
    precision: str | None = None,
) -> dict[str, float]:
    """Metrics of an adapter on the client's own test samples, under its own head if it has one.

    Parameters
    ----------
    precision : str, optional
        Of the base (default: the run's).

    Raises
    ------
    DataError
        If it has none.
    """
    if not len(samples):
        raise DataError(
            "this client has no test samples: give its data a test part", fault="data-empty"
        )
    settings = workspace.settings
    heads = workspace.heads
    if own_head is not None:
        adapter, heads = replace(adapter, head=own_head), workspace.own_heads
    base = workspace.base if precision is None else workspace.base_at(precision)
    model = inject(base, adapter.ranks, scale=adapter.scale, dropout=0.0, heads=heads).to(
        workspace.device
    )
    try:
        load_adapter(model, adapter)
        size, task = settings.server.evaluate_batch_size, workspace.task
        return task.evaluate(model, task.test, samples.tolist(), workspace.device, size)
    finally:
        eject(model)


def _attempt(
    workspace: Workspace, job: Job, plan: Plan
) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """Train once at a plan, and leave the base as it was, whatever happens."""
    settings, base = workspace.settings, workspace.base_at(plan.precision)
    given = job.adapter.cut(plan.ranks)
    remainder = job.adapter.rest(plan.ranks) if plan.remainder_rank else None
    travels = set(given.moving(plan.trainable))
    if job.own_head is not None:
        own = job.own_head.load(job.round) or head_tensors(base, workspace.own_heads)
        given = replace(given, head=own)
    torch.manual_seed(derive(settings.run.seed, "train", job.round, job.client))
    model = inject(
        base,
        plan.ranks,
        scale=given.scale,
        dropout=settings.lora.dropout,
        heads=(*workspace.heads, *workspace.own_heads),
        remainder_ranks=remainder.ranks if remainder else None,
    ).to(workspace.device)
    try:
        load_adapter(model, given)
        if remainder and remainder.factors:
            load_adapter(model, remainder, REMAINDER)
        if plan.trainable != "both":
            train_only(model, plan.trainable)
        if not workspace.group.leads:  # else all processes would drop out alike
            own_seed = derive(
                settings.run.seed, "train", job.round, job.client, workspace.group.rank
            )
            torch.manual_seed(own_seed)
        wanted = "scores" in plan.extras and workspace.group.leads
        scores = _scores(workspace, job, model) if wanted else {}
        parameters = _trained_parameters(model)
        decay = _rank_decay(settings, plan, parameters)
        penalties = [*_proximal(settings, given, parameters), *decay]
        limit = allocator_limit(workspace.device, *_allocator_bytes(workspace, job, plan))
        with checkpointing(base, plan.checkpointing), limit:
            metrics = _fit(workspace, job, plan, model, parameters, penalties)
        trained = {n: t.detach().cpu().clone() for n, t in read_state(model).items()}
        state = {n: t for n, t in trained.items() if n in travels}
        if job.own_head is not None and workspace.group.leads:
            job.own_head.save(job.round, Adapter.from_state_dict(trained, given.scale).head)
        if any(term.prunes() for term in decay):
            metrics |= {Metric.PRUNED: 1, Metric.RANK_CAP: decay[0].keep}
            state = cut_state(state, decay[0].keep)
        return state, metrics | scores
    finally:
        eject(model)
        base.eval()
        if settings.train.compile:
            torch.compiler.reset()  # or the compiled step would keep this adapter's modules


def _allocator_bytes(workspace: Workspace, job: Job, plan: Plan) -> tuple[int | None, int | None]:
    """Bytes for torch's allocator: what is planned, as far as that goes, and the most (None = all).

    What lies outside of it is the plan's word for the plan, and this process's own measure for the
    cap: a server cannot talk a node out of its limit.
    """
    if workspace.device.type != "cuda":
        return None, None
    most = job.cap_bytes
    if most is not None:
        most -= outside_bytes(workspace.device, workspace.group.size)
    if not workspace.keeps_to_plan or not plan.outside_bytes:
        return most, most
    planned = plan.peak_bytes - plan.outside_bytes
    return (planned if most is None else min(planned, most)), most


def _scores(workspace: Workspace, job: Job, model: PeftModel) -> dict[str, float]:
    """Fisher scores of the modules, on some of the client's own samples."""
    draw = np.random.default_rng(
        derive(workspace.settings.run.seed, "probe", job.round, job.client)
    )
    probe = workspace.settings.method.probe_samples or len(job.samples)
    rows = draw.permutation(job.samples)[:probe]
    found = fisher_scores(model, workspace.task.train, rows, workspace.device)
    return {f"{Metric.SCORE}{module}": score for module, score in found.items()}


def _trained_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Parameters that require grad, under the names that they are saved by."""
    by_place = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    saved = read_state(model)
    return {name: by_place[t.data_ptr()] for name, t in saved.items() if t.data_ptr() in by_place}


def _proximal(
    settings: RunSettings, given: Adapter, parameters: Mapping[str, nn.Parameter]
) -> list[Penalty]:
    mu = settings.train.proximal
    return [Proximal(parameters, given.state_dict(), mu)] if mu else []


def _rank_decay(
    settings: RunSettings, plan: Plan, parameters: Mapping[str, nn.Parameter]
) -> list[RankDecay]:
    if "prune" not in plan.extras or plan.rank < 2:
        return []
    keep = pruned_rank(plan.rank, settings.method.prune_decay)
    return [RankDecay(parameters, keep, settings.method.prune_weight)]


def _loss(workspace: Workspace, job: Job) -> Loss:
    """The loss that the run asks for."""
    weight, train = workspace.settings.train.label_prior, workspace.task.train
    if not weight:
        return plain
    return prior_adjusted(
        torch.from_numpy(train.labels[job.samples]), workspace.task.labels, weight
    )


def _fit(
    workspace: Workspace,
    job: Job,
    plan: Plan,
    model: PeftModel,
    parameters: Mapping[str, nn.Parameter],
    penalties: Sequence[Penalty],
) -> dict[str, int | float]:
    """Run the optimizer steps of one round; the gradient of a step is the mean over its batch."""
    settings, group = workspace.settings, workspace.group
    accelerator = Accelerator(cpu=workspace.device.type == "cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    rate, loss_of = learning_rate(settings, job.round), _loss(workspace, job)
    # evaluation_mode: the group adds up the gradients, not DistributedDataParallel.
    model = accelerator.prepare_model(model, evaluation_mode=True)
    own_optimizer = make_optimizer(settings, plan, parameters, rate)
    before = (job.moments and job.moments.load(job.round)) or {}
    recall(own_optimizer, parameters, before)
    optimizer = accelerator.prepare_optimizer(own_optimizer)
    set_training(model)
    called = model
    if settings.train.compile:
        called = cast(nn.Module, torch.compile(model, backend=settings.train.compile))
    meter = meter_of(workspace.device, job.cap_bytes, model, optimizer, plan.outside_bytes)
    scaler = loss_scaler(settings, plan.precision, workspace.device)
    loss_sum, seen, steps, skipped = 0.0, 0.0, 0, 0
    minutes, began = workspace.policy.work.minutes, time.monotonic()
    for batch in _batches(settings, job):
        if minutes and time.monotonic() - began > 60 * minutes:
            raise NotAllowed(
                f"{steps} steps took the {minutes:g} minutes of the policy's work.minutes",
                fault="policy-minutes",
            )
        # Encoded before the step: what the data set itself holds is no memory of the step.
        own = group.share(batch)
        waiting = [workspace.task.train.collate(part) for part in chunks(own, plan.micro_batch)]
        waiting.reverse()
        counts = [count_targets(inputs["labels"]) for inputs in waiting]
        (total,) = group.agree(sum(counts))
        with meter.step():
            while waiting:
                inputs, count = waiting.pop(), counts.pop()
                if not count:
                    continue  # a row whose answers were all cut off: a mean over nothing
                inputs = place(inputs, model, workspace.device)
                meter.see(inputs)
                with autocast(settings, workspace.device):
                    loss = loss_of(called, inputs)
                accelerator.backward(scaler.scale(loss * (count / total)))
                loss_sum += float(loss.detach()) * count
                del loss, inputs
            group.agree()
            group.add_gradients(trained)
            scaler.unscale_(optimizer)
            add_all(penalties)
            if settings.train.max_grad_norm:
                accelerator.clip_grad_norm_(trained, settings.train.max_grad_norm)
            scaler.step(optimizer)
            scaled_by = scaler.get_scale()
            scaler.update()
            skipped += int(scaler.get_scale() < scaled_by)
            optimizer.zero_grad(set_to_none=True)
        seen, steps = seen + total, steps + 1
    if job.moments and group.leads:
        job.moments.save(job.round, {**before, **kept_moments(own_optimizer, parameters)})
    (loss_sum,) = group.agree(loss_sum)
    peak = group.largest(meter.peak())
    group.part()
    if skipped:
        log.warning("client %s: %d of %d steps overflowed fp16", job.client, skipped, steps)
    return {
        Metric.NUM_EXAMPLES: len(job.samples),
        Metric.TRAIN_LOSS: loss_sum / max(1, seen),
        Metric.STEPS: steps,
        Metric.LEARNING_RATE: rate,
        Metric.PEAK_MEMORY_BYTES: peak,
    }


def autocast(settings: RunSettings, device: torch.device) -> torch.autocast:
    """The forward pass in ``train.autocast``; the backward pass follows it."""
    lower = DTYPES.get(settings.train.autocast)
    return torch.autocast(device.type, dtype=lower, enabled=lower is not None)


def loss_scaler(
    settings: RunSettings, precision: str, device: torch.device
) -> torch.amp.GradScaler:
    """Scales the loss where fp16 is computed, so that gradients do not vanish; else does nothing.

    The first scale is lower than torch's: a round may have few steps, and one that overflows is
    left out.
    """
    computed = (settings.model.at(precision).precision, settings.train.autocast)
    return torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled="fp16" in computed)


def make_optimizer(
    settings: RunSettings, plan: Plan, parameters: Mapping[str, nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """Build the optimizer of the run over the trained parameters, at the round's learning rate."""
    train = settings.train
    # Of Adam alone: what SGD moves depends on the gradient, what Adafactor moves on the row. The
    # head's one moment is of torch's AdamW alone: bitsandbytes' keeps a moment for each number.
    adam = train.optimizer.startswith("adamw")
    own = plan.rates if adam else Rates()
    return build_optimizer(
        train.optimizer, own.groups(parameters.items(), rate), rate=rate,
        decay=train.weight_decay, momentum=train.momentum,
    )  # fmt: skip


def _batches(settings: RunSettings, job: Job) -> Iterator[list[int]]:
    """Shuffled batches of indices: whole epochs, or as many as the run's steps ask for."""
    draw = np.random.default_rng(derive(settings.run.seed, "order", job.round, job.client))
    left = settings.train.steps
    epochs = settings.train.epochs
    while epochs > 0 or left > 0:
        for batch in chunks(draw.permutation(job.samples).tolist(), settings.train.batch_size):
            yield list(batch)
            left -= 1
            if settings.train.steps and left == 0:
                return
        epochs = 0 if settings.train.steps else epochs - 1
