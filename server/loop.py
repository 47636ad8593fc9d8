"""The run loop over Flower's Grid: rounds, evaluation, checkpoints, and going on after a stop."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from rankfit.adapters.adapter import Adapter, initial
from rankfit.configs.settings import RunSettings, derive, split_list
from rankfit.estimator.plan import Plan
from rankfit.estimator.plan_search import Estimator, inputs_of
from rankfit.estimator.tracer import TraceCache
from rankfit.server import reporting
from rankfit.server.best import BestRound, check_metric
from rankfit.server.evaluation import Evaluator, Importance
from rankfit.server.report import write_report
from rankfit.server.reporting import Holdings, console
from rankfit.server.run_directory import Checkpoint, RunDirectory, room_for
from rankfit.server.trackers import Trackers
from rankfit.strategies.fleet import exchange, in_order
from rankfit.strategies.methods import configured, find
from rankfit.strategies.planner import Planner
from rankfit.strategies.strategy import HeterogeneousLora
from rankfit.strategies.training_round import Outcome, summarise
from rankfit.tasks import load_task
from rankfit.tasks.base_model import (
    check_quantizable,
    fingerprint,
    load_base,
    shared_heads,
    target_modules,
)
from rankfit.tasks.model_sources import resolve_source
from rankfit.tasks.partition import partition_of
from rankfit.tasks.peft_adapter import start_from
from rankfit.tasks.targets import head_tensors, target_shapes
from rankfit.tasks.task import Task

log = logging.getLogger(__name__)

#: Of this process: runs that follow one another trace a step once.
_TRACES = TraceCache()

#: Examples of each client whose length is measured for the report.
_MEASURED = 200
#: How long the end of a run waits for clients to end their workers.
_FAREWELL_SECONDS = 30.0


class RunFailed(RuntimeError):
    """A run that has taught the adapter nothing."""


@dataclass(frozen=True)
class Federation:
    """All parts of a run, ready to start."""

    settings: RunSettings
    directory: RunDirectory
    strategy: HeterogeneousLora
    evaluator: Evaluator
    start: Adapter
    heads: tuple[str, ...]
    #: What is divided among the clients; None where every node has files of its own.
    data: Task | None


def federate(grid: Grid, settings: RunSettings) -> Adapter:
    """Run all rounds that are not yet done; return the last global adapter.

    Raises
    ------
    ConfigError, ModelError, DataError, PartitionError
        For settings, a model or data that cannot be used; before any training.
    FleetError
        If too few clients that can train are there in time.
    RunFailed
        If not one update was merged in all rounds.
    StorageError
        If the run directory cannot be written.
    """
    federation = build(settings)
    try:
        with room_for(federation.directory.path):
            return _play(federation, grid)
    finally:
        federation.directory.close()
        federation.strategy.fleet.finish(grid, _FAREWELL_SECONDS)


def _play(federation: Federation, grid: Grid) -> Adapter:
    settings, directory, strategy = federation.settings, federation.directory, federation.strategy
    checkpoint = directory.open()
    if checkpoint is not None:
        log.info("resuming %s after round %d", directory.path, checkpoint.round)
        strategy.restore(checkpoint.strategy, checkpoint.tensors, checkpoint.round)
    strategy.summary()
    log.info("waiting for clients and planning what each device can train")
    strategy.prepare(grid, 0)  # a fleet that cannot train is refused before anything is written
    if checkpoint is None:
        _check_holdout(federation)
    holdings = who_holds_what(federation)
    directory.create()
    if federation.data is not None:
        parts = {
            f"partition-{i}": len(own) for i, own in enumerate(holdings.parts if holdings else ())
        }
        strategy.know(parts, len(federation.data.train), len(federation.data.test))
    if holdings is not None:
        holdings.save(directory.path)
    if checkpoint is None:
        checkpoint = _round_zero(federation)
    adapter, best = _play_rounds(federation, grid, checkpoint)
    rounds = directory.rounds()
    write_report(directory.path, settings, rounds)
    console().print(reporting.results(strategy, rounds))
    if not reporting.merged(rounds):
        faults = ", ".join(f"{count} × {kind}" for kind, count in reporting.faults(rounds).items())
        raise RunFailed(
            f"not one update was merged in {rounds[-1]['round']} rounds ({faults or 'none came'}); "
            f"the adapter is that of the start. What each client said: {directory.path}/report.html"
        )
    console().print(reporting.closing(directory.path, rounds, settings.best, best), markup=False)
    return adapter


def _play_rounds(
    federation: Federation, grid: Grid, checkpoint: Checkpoint
) -> tuple[Adapter, BestRound]:
    """Play the rounds after a checkpoint; return the last adapter and which round was best."""
    settings, strategy = federation.settings, federation.strategy
    adapter, first = checkpoint.adapter, checkpoint.round + 1
    best = BestRound.of(checkpoint.best)
    known: dict[str, Plan] = {}
    path, identity = federation.directory.path, strategy.identity
    with Trackers(settings, path, identity, first) as trackers:
        for number in range(first, settings.run.rounds + 1):
            if best.stops(settings.best):
                log.info("%s", reporting.stop_line(number - 1, settings, best))
                break
            began = time.monotonic()
            outgoing = strategy.open_round(number, adapter, grid)
            known = _note_plans(federation, known, number)
            if number == first:
                log.info("round %d: %d clients load the model and train", number, len(outgoing))
            adapter, line = play_round(federation, grid, outgoing, number)
            line |= {"diagnostics": _finite(strategy.diagnostics)} if strategy.diagnostics else {}
            best = _choose(federation, best, line)
            line["seconds"] = round(time.monotonic() - began, 3)
            _record(federation, adapter, line, best)
            trackers.log(line)
            log.info("%s", reporting.round_line(line, settings))
            for text in reporting.client_lines(line, strategy.plans):
                log.info("%s", text)
    return adapter, best


def _choose(federation: Federation, best: BestRound, line: dict[str, Any]) -> BestRound:
    """Compare a round with the best so far, and note in its line which is best now."""
    rules = federation.settings.best
    figures = line.get("holdout" if rules.holdout else "evaluation")
    if not rules.metric or figures is None:
        return best
    if figures and not best.round and rules.metric not in figures:
        log.warning(
            "round %d gave no %s to choose the best round by, but %s",
            line["round"], rules.metric, ", ".join(sorted(figures)),
        )  # fmt: skip
    best = best.after(line["round"], figures, rules)
    line["best"] = best.round
    return best


def _check_holdout(federation: Federation) -> None:
    """Measure one batch of the holdout, so that a metric there is not is refused in time."""
    settings, evaluator = federation.settings, federation.evaluator
    if settings.best.held_out and federation.data is not None:
        rows = range(min(len(federation.data.holdout), settings.server.evaluate_batch_size))
        figures = evaluator.on(federation.start, federation.data.holdout, rows)
        check_metric(settings.best, figures)
        log.info(
            "the server holds %d training examples back, to choose the best round by their %s",
            len(federation.data.holdout), settings.best.metric,
        )  # fmt: skip


def build(settings: RunSettings) -> Federation:
    """Check and load everything that a run needs, cheapest checks first."""
    method = configured(find(settings.method.name), settings)
    directory = RunDirectory(settings)
    log.info("loading data %s and model %s", settings.data.source, settings.model.source)
    task = load_task(settings)
    for precision in split_list(settings.plan.precisions):
        lowered = settings.model.at(precision)
        check_quantizable(lowered, resolve_source(lowered.source).kind)
    base = load_base(settings, task.labels, task.output_names)
    task.check_model(base)
    targets = target_modules(base, settings.lora.targets)
    heads = shared_heads(base, settings.head)
    shapes = target_shapes(base, targets, settings.lora.rank)
    inputs = inputs_of(task.example_batch(1))

    phases = method.schedule(1, settings).phases
    estimator = Estimator.for_run(
        settings, base.config, inputs, phases=phases, whole_head=method.rates.whole_head,
        traces=_TRACES,
    )  # fmt: skip
    fresh = initial(
        shapes,
        settings.lora.rank,
        settings.lora.scale,
        head_tensors(base, heads),
        derive(settings.run.seed, "adapter"),
    )
    start = start_from(settings, fresh)
    planner = Planner(settings, method, estimator)
    own = fingerprint(base, heads=heads)
    evaluator = Evaluator(settings, task, base, heads)
    importance = Importance(settings, task, evaluator)
    strategy = HeterogeneousLora(settings, method, planner, own, importance)
    data = None if settings.partition.kind == "local" else task
    return Federation(settings, directory, strategy, evaluator, start, heads, data)


def who_holds_what(federation: Federation) -> Holdings | None:
    """The parts of a data set that is divided among the nodes; None where they have their own.

    To be called when the fleet has said into how many parts. A partition that cannot be made is a
    PartitionError.
    """
    task, partitions = federation.data, federation.strategy.fleet.partitions
    if task is None or not partitions:
        return None
    parts = partition_of(task.train.examples, federation.settings, partitions)
    lengths = [task.train.lengths(part[_evenly(len(part))].tolist()) for part in parts]
    return Holdings(parts, task.train.labels, task.class_names, lengths)


def _evenly(count: int) -> NDArray[np.int64]:
    """Positions of at most :data:`_MEASURED` of so many examples, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, _MEASURED)).astype(np.int64))


def play_round(
    federation: Federation, grid: Grid, outgoing: Sequence[Message], number: int
) -> tuple[Adapter, dict[str, Any]]:
    """Train, merge and evaluate an opened round; return the next adapter and the round's line."""
    began = time.monotonic()
    strategy, settings = federation.strategy, federation.settings
    replies = exchange(grid, outgoing, settings.server.round_timeout_seconds)
    for position, reply in in_order(replies, settings.server.max_waiting_updates):
        strategy.receive(position, reply)
    adapter, outcomes = strategy.close_round()
    line: dict[str, Any] = {"round": number, **summarise(outcomes)}
    line["train-seconds"] = round(time.monotonic() - began, 3)
    if number % settings.server.evaluate_every == 0 or number == settings.run.rounds:
        line["evaluation"] = _evaluate(federation, grid, strategy.exported(adapter), number)
        if settings.server.average and settings.server.evaluate_unaveraged:
            below = _evaluate(federation, grid, strategy.unaveraged(adapter), number)
            line["evaluation"] |= {f"unaveraged-{name}": value for name, value in below.items()}
        if settings.best.held_out and federation.data is not None:
            measured = federation.evaluator.on(strategy.exported(adapter), federation.data.holdout)
            line["holdout"] = _finite(measured)
    line["clients"] = {outcome.client: _client_line(outcome) for outcome in outcomes}
    return adapter, line


def _round_zero(federation: Federation) -> Checkpoint:
    """Write the start as checkpoint and line 0, so that a stop in round 1 can be resumed too."""
    checkpoint = Checkpoint(0, federation.start, {})
    line: dict[str, Any] = {"round": 0}
    if federation.settings.server.evaluate == "server":
        line["evaluation"] = _finite(federation.evaluator(federation.start))
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
        return _finite(federation.evaluator(adapter))
    outgoing = federation.strategy.evaluation_messages(number, adapter)
    timeout = federation.settings.server.round_timeout_seconds
    replies = dict(exchange(grid, outgoing, timeout))
    return federation.strategy.evaluated(replies[p] for p in sorted(replies))


def _record(
    federation: Federation, adapter: Adapter, line: Mapping[str, Any], best: BestRound
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
        best.state() if federation.settings.best.metric else {},
    )
    federation.directory.save(checkpoint, federation.heads)


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
    console().print(reporting.plans(strategy))
    return dict(strategy.plans)


def _client_line(outcome: Outcome) -> dict[str, Any]:
    fault = {"kind": outcome.kind, "reason": outcome.reason} if outcome.reason else {}
    return {
        "rank": outcome.rank,
        "merged": outcome.merged,
        **fault,
        **outcome.metrics,
        "parameters": outcome.parameters,
        "upload-bytes": outcome.upload_bytes,
        "download-bytes": outcome.download_bytes,
    }


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures that JSON can hold: a model that has diverged has a loss that is none."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
