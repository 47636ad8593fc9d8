"""What is wrong with a run, found before anything is started: cheapest checks first.

The ServerApp and the clients check the same when they begin; here a mistake costs seconds and one
line, there a start of Flower and Ray.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rankfit.configs.compose import is_local
from rankfit.configs.settings import ConfigError, RunSettings, split_list, split_numbers
from rankfit.tasks.model_sources import read_config_file, resolve_source
from rankfit.tasks.records import DataError

if TYPE_CHECKING:
    from rankfit.strategies.methods import Method
    from rankfit.tasks.task import Task

log = logging.getLogger(__name__)

#: Parameters up to which a model of random weights is made to try packing on.
_SMALL = 100_000_000


def check_run(settings: RunSettings) -> list[str]:
    """Check settings, model, data, labels, lengths, targets and plan of a simulation.

    Each check imports what it needs and no more: torch takes seconds.

    Returns
    -------
    list of str
        What was found out and is worth a line: a source on the hub, a new head, a padding token.

    Raises
    ------
    ConfigError, ModelError, DataError, PartitionError
        For the first thing that is wrong.
    """
    with _noted() as notes:
        _check_places(settings)
        _check_size(settings)
        method = _check_method(settings)
        task = _check_data(settings)
        _check_model(settings, method, task)
    return notes


def _check_places(settings: RunSettings) -> None:
    """Files and folders that are named must be there."""
    source = resolve_source(settings.model.source)
    if source.kind == "config" and source.path is not None:
        read_config_file(source.path)
    elif source.kind == "folder" and source.path is not None:
        read_config_file(source.path / "config.json")
    data = settings.data.source
    if settings.partition.kind != "local" and is_local(data) and not Path(data).exists():
        raise DataError(f"data.source {data!r}: there is no such file or folder")


def _check_size(settings: RunSettings) -> None:
    """A simulation must be able to bring the clients that a round waits for."""
    clients, waits = settings.simulation.clients, settings.server.min_clients
    if waits > clients:
        raise ConfigError(
            f"server.min-clients {waits}: there are simulation.clients={clients}, so no round "
            f"would start; set it to at most {clients}"
        )
    cpus, has = settings.simulation.cpus_per_client, os.cpu_count() or 1
    if cpus > has:
        raise ConfigError(
            f"simulation.cpus-per-client {cpus:g}: this machine has {has} CPUs, so no client would "
            f"start; set it to at most {has}"
        )


def _check_method(settings: RunSettings) -> "Method":
    from rankfit.strategies.methods import configured, find

    return configured(find(settings.method.name), settings)


def _check_data(settings: RunSettings) -> "Task":
    """Read tokenizer and data as the server will, and deal them."""
    from rankfit.tasks import load_task
    from rankfit.tasks.partition import partition_of

    task = load_task(settings)
    task.example_batch(1)  # the tokenizer or the image processor, and the lengths
    if settings.partition.kind != "local":
        _ = task.labels, task.class_names
        partition_of(task.train.examples, settings, settings.simulation.clients)
    return task


def _check_model(settings: RunSettings, method: "Method", task: "Task") -> None:
    """Targets, ranks, heads and plans, on a model without weights."""
    from rankfit.adapters.adapter import initial
    from rankfit.tasks.base_model import (
        build_empty,
        build_random,
        check_quantizable,
        load_config,
        target_modules,
        whole_modules,
    )
    from rankfit.tasks.targets import head_tensors, shared_heads, target_shapes

    model, kind = settings.model, settings.task.kind
    for each in (model, *(model.at(p) for p in split_list(settings.plan.precisions))):
        check_quantizable(each, resolve_source(each.source).kind)
    config = load_config(
        model, labels=task.labels, problem=settings.task.problem, names=task.output_names
    )
    empty = build_empty(config, kind, attention=model.attention, precision=model.precision)
    rank = settings.lora.rank
    shapes = target_shapes(empty, target_modules(empty, settings.lora.targets), rank)
    whole_modules(empty, settings.head)
    if settings.lora.start:
        from rankfit.tasks.peft_adapter import read_start

        heads = head_tensors(empty, shared_heads(empty, settings.head))
        read_start(settings, initial(shapes, rank, settings.lora.scale, heads, 0))
    if settings.task.packing and empty.num_parameters() <= _SMALL:
        task.check_model(build_random(config, kind, model))
    if settings.fleet.memory_mib:
        _check_plans(settings, method, task)


def _check_plans(settings: RunSettings, method: "Method", task: "Task") -> None:
    """At least one of the declared devices must be able to train."""
    from rankfit.client.device import device_report
    from rankfit.estimator.plan_search import Estimate, Estimator, inputs_of
    from rankfit.tasks.base_model import load_config

    config = load_config(settings.model, labels=task.labels, problem=settings.task.problem)
    inputs = inputs_of(task.example_batch(1))
    estimator = Estimator.for_run(settings, config, inputs, whole_head=method.rates.whole_head)
    reasons = []
    memory = split_numbers(settings.fleet.memory_mib, "fleet.memory-mib")
    for number in sorted(range(len(memory)), key=lambda each: -memory[each]):
        node = {"partition-id": number, "num-partitions": settings.simulation.clients}
        fit = estimator.fit(device_report(node, settings, node_id=number))
        if isinstance(fit, Estimate):
            return
        reasons.append(fit.reason)
    raise ConfigError(f"no device of fleet.memory-mib can train: {reasons[0]}")


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collect what the package logs; shown only if nothing is wrong, so that an error stands alone.

    Warnings of other libraries are theirs.
    """
    notes: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    logger = logging.getLogger("rankfit")
    handler, level, passed = Notes(logging.INFO), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passed
