"""The run loop over Flower's Grid: rounds, evaluation, checkpoints, and going on after a stop."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from torch.utils.tensorboard import SummaryWriter

from rankfit.adapters.names import Moves
from rankfit.adapters.state import Adapter, initial
from rankfit.configs.seeds import derive
from rankfit.configs.settings import RunSettings, split_list
from rankfit.estimator.fit import Estimator, inputs_of
from rankfit.estimator.plan import Plan
from rankfit.estimator.tracer import TraceCache
from rankfit.server import tables
from rankfit.server.evaluation import Evaluator
from rankfit.server.holdings import Holdings
from rankfit.server.importance import Importance
from rankfit.server.logs import console
from rankfit.server.report import write_report
from rankfit.server.rundir import Checkpoint, RunDirectory
from rankfit.strategies import messages
from rankfit.strategies.catalogue import find
from rankfit.strategies.fleet import exchange, in_order
from rankfit.strategies.heterogeneous_lora import HeterogeneousLora
from rankfit.strategies.method import configured
from rankfit.strategies.outcome import Outcome, summarise
from rankfit.strategies.planning import Planner
from rankfit.tasks.adapted import head_tensors, target_shapes
from rankfit.tasks.catalogue import load_task
from rankfit.tasks.models import fingerprint, load_base, shared_heads, target_modules
from rankfit.tasks.partition import partition_of
from rankfit.tasks.quantized import check_quantizable
from rankfit.tasks.scores import pooled
from rankfit.tasks.sources import resolve_source

log = logging.getLogger(__name__)

#: Of this process: runs that follow one another trace a step once.
_TRACES = TraceCache()

#: How long the end of a run waits for clients to end their workers.
_FAREWELL_SECONDS = 30.0


@dataclass(frozen=True)
class Federation:
    """All parts of a run, ready to start."""

    settings: RunSettings
    directory: RunDirectory
    strategy: HeterogeneousLora
    evaluator: Evaluator
    start: Adapter
    heads: tuple[str, ...]
    holdings: Holdings | None


def federate(grid: Grid, settings: RunSettings) -> Adapter:
    """Run all rounds that are not yet done; return the last global adapter.

    Raises
    ------
    ConfigError, ModelError, DataError, PartitionError
        For settings, a model or data that cannot be used; before any training.
    FleetError
        If too few clients that can train are there in time.
    """
    federation = build(settings)
    try:
        return _play(federation, grid)
    finally:
        federation.strategy.fleet.finish(grid, _FAREWELL_SECONDS)


def _play(federation: Federation, grid: Grid) -> Adapter:
    settings, directory, strategy = federation.settings, federation.directory, federation.strategy
    checkpoint = directory.load() if settings.run.resume else None
    if checkpoint is not None:
        log.info("resuming %s after round %d", directory.path, checkpoint.round)
        strategy.restore(checkpoint.strategy, checkpoint.tensors, checkpoint.round)
    strategy.summary()
    strategy.prepare(grid, 0)  # a fleet that cannot train is refused before anything is written
    directory.create()
    if federation.holdings is not None:
        federation.holdings.save(directory.path)
    if checkpoint is None:
        checkpoint = _round_zero(federation)
    adapter, first = checkpoint.adapter, checkpoint.round + 1
    known: dict[str, Plan] = {}
    with SummaryWriter(directory.path / "events", purge_step=first) as events:
        for number in range(first, settings.run.rounds + 1):
            began = time.monotonic()
            outgoing = strategy.open_round(number, adapter, grid)
            known = _note_plans(federation, known, number)
            adapter, line = play_round(federation, grid, outgoing, number)
            line |= {"diagnostics": strategy.diagnostics} if strategy.diagnostics else {}
            line["seconds"] = round(time.monotonic() - began, 3)
            _record(federation, events, adapter, line)
            log.info("%s", tables.round_line(line, settings.run.rounds))
    rounds = directory.rounds()
    write_report(directory.path, settings, rounds)
    console().print(tables.results(strategy, rounds))
    console().print(tables.closing(directory.path, rounds))
    return adapter


def build(settings: RunSettings) -> Federation:
    """Check and load everything that a run needs, cheapest checks first."""
    method = configured(find(settings.method.name), settings)
    directory = RunDirectory(settings)
    task = load_task(settings)
    holdings = None
    if settings.partition.kind != "local":
        parts = partition_of(task.train.examples, settings, settings.simulation.clients)
        holdings = Holdings(parts, task.train.labels, task.class_names)
    for precision in split_list(settings.plan.precisions):
        lowered = settings.model.at(precision)
        check_quantizable(lowered, resolve_source(lowered.source).kind)
    base = load_base(settings, task.labels)
    targets = target_modules(base, settings.lora.targets)
    heads = shared_heads(base, settings.head)
    shapes = target_shapes(base, targets, settings.lora.rank)
    inputs = inputs_of(task.example_batch(1))

    def estimator(planned: RunSettings, phases: tuple[Moves, ...]) -> Estimator:
        return Estimator.for_run(planned, base.config, inputs, phases=phases, traces=_TRACES)

    start = initial(
        shapes,
        settings.lora.rank,
        settings.lora.scale,
        head_tensors(base, heads),
        derive(settings.run.seed, "adapter"),
    )
    planner = Planner(settings, method, estimator)
    own = fingerprint(base, heads=heads)
    evaluator = Evaluator(settings, task, base, heads)
    importance = Importance(settings, task, evaluator)
    strategy = HeterogeneousLora(settings, method, planner, own, importance)
    return Federation(settings, directory, strategy, evaluator, start, heads, holdings)


def play_round(
    federation: Federation, grid: Grid, outgoing: Sequence[Message], number: int
) -> tuple[Adapter, dict[str, Any]]:
    """Train, merge and evaluate an opened round; return the next adapter and the round's line."""
    began = time.monotonic()
    strategy, settings = federation.strategy, federation.settings
    replies = exchange(grid, outgoing, settings.server.round_timeout_seconds)
    for position, reply in in_order(replies, settings.server.keep_waiting):
        strategy.fold(position, reply)
    adapter, outcomes = strategy.close_round()
    line: dict[str, Any] = {"round": number, **summarise(outcomes)}
    line["train-seconds"] = round(time.monotonic() - began, 3)
    if number % settings.server.evaluate_every == 0 or number == settings.run.rounds:
        line["evaluation"] = _evaluate(federation, grid, strategy.exported(adapter), number)
        if settings.server.average and settings.server.evaluate_unaveraged:
            below = _evaluate(federation, grid, strategy.unaveraged(adapter), number)
            line["evaluation"] |= {f"unaveraged-{name}": value for name, value in below.items()}
    line["clients"] = {outcome.client: _client_line(outcome) for outcome in outcomes}
    return adapter, line


def _round_zero(federation: Federation) -> Checkpoint:
    """Write the start as checkpoint and line 0, so that a stop in round 1 can be resumed too."""
    checkpoint = Checkpoint(0, federation.start, {})
    line: dict[str, Any] = {"round": 0}
    if federation.settings.server.evaluate == "server":
        line["evaluation"] = federation.evaluator(federation.start)
    federation.directory.append_round(line)
    federation.directory.save(checkpoint, federation.heads)
    return checkpoint


def _evaluate(
    federation: Federation, grid: Grid, adapter: Adapter, number: int
) -> dict[str, float]:
    where = federation.settings.server.evaluate
    if where == "none":
        return {}
    if where == "server":
        return federation.evaluator(adapter)
    outgoing = federation.strategy.evaluation_messages(number, adapter)
    timeout = federation.settings.server.round_timeout_seconds
    replies = dict(exchange(grid, outgoing, timeout))
    for reply in replies.values():
        if reply.has_error():
            log.warning("round %d: an evaluation failed: %s", number, messages.failure(reply))
    usable = [replies[p] for p in sorted(replies) if not replies[p].has_error()]
    return pooled(messages.metrics(reply) for reply in usable)


def _record(
    federation: Federation, events: SummaryWriter, adapter: Adapter, line: Mapping[str, Any]
) -> None:
    """Write a round down: its line first, then the checkpoint that makes it final."""
    federation.directory.append_round(line)
    strategy = federation.strategy
    exported = strategy.exported(adapter)
    checkpoint = Checkpoint(
        line["round"],
        adapter,
        strategy.state(),
        strategy.tensors(),
        None if exported is adapter else exported,
    )
    federation.directory.save(checkpoint, federation.heads)
    for key in ("train-loss", "updates", "dropped", "upload-bytes", "download-bytes", "seconds"):
        if key in line:
            events.add_scalar(f"round/{key}", line[key], line["round"])
    for group in ("evaluation", "diagnostics"):
        for key, value in line.get(group, {}).items():
            events.add_scalar(f"{group}/{key}", value, line["round"])
    events.flush()


def _note_plans(federation: Federation, known: Mapping[str, Plan], number: int) -> dict[str, Plan]:
    """Write down and show the plans that are new, with the reports that they rest on."""
    strategy = federation.strategy
    if strategy.plans == known:
        return dict(known)
    federation.directory.append_plans(
        {
            "round": number,
            "client": client,
            "plan": plan.to_dict(),
            "device": strategy.fleet.devices[client].report.to_dict(),
        }
        for client, plan in sorted(strategy.plans.items())
        if known.get(client) != plan
    )
    console().print(tables.plans(strategy))
    return dict(strategy.plans)


def _client_line(outcome: Outcome) -> dict[str, Any]:
    line = asdict(outcome)
    finite = {k: v for k, v in outcome.metrics.items() if math.isfinite(v)}
    return {
        "rank": line["rank"],
        "merged": line["merged"],
        **({"reason": line["reason"]} if line["reason"] else {}),
        **finite,
        "parameters": line["parameters"],
        "upload-bytes": line["upload_bytes"],
        "download-bytes": line["download_bytes"],
    }
