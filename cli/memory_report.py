"""``rankfit memory-report``: what was estimated beside what was measured, for a run directory."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfit.cli.estimate import Format, write
from rankfit.configs.protocol import Metric
from rankfit.configs.settings import ConfigError, RunSettings, from_flat
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.plan import Plan

if TYPE_CHECKING:
    from rankfit.estimator.plan_search import Estimator
    from rankfit.estimator.trace import Breakdown

MIB = 2**20
_COLUMNS = ("client", "device", "round", "rank", "batch", "expected MiB", "measured MiB", "error")
_PARTS = ("parameters", "forward", "gradients", "optimizer", "overhead")


def memory_report(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    components: Annotated[
        bool, typer.Option(help="Split each estimate; loads the run's data, but no weights.")
    ] = True,
    measure: Annotated[
        bool, typer.Option(help="Also measure the components of CPU steps here, on real tensors.")
    ] = False,
    form: Annotated[Format, typer.Option("--format", help="table, json or latex.")] = Format.TABLE,
) -> None:
    """Compare estimated and measured memory of a run, client by client and part by part."""
    settings, rows = read_run(directory)
    if components or measure:
        add_components(settings, rows, measure)
    if form is Format.JSON:
        typer.echo(json.dumps(rows, indent=2))
        return
    write(form, rows, "estimated and measured peaks", _COLUMNS, [_total(row) for row in rows])
    split = [cells for row in rows for cells in _split(row)]
    if split:
        columns = ("client", "component", "estimated MiB", "measured here MiB", "error")
        write(form, rows, "components", columns, split)


def read_run(directory: Path) -> tuple[RunSettings, list[dict[str, Any]]]:
    """Settings of a run, and for each client its last round that trained a whole plan.

    Raises
    ------
    ConfigError
        If the folder holds no run, or no round with a measured peak.
    """
    try:
        tables = tomllib.loads((directory / "config.toml").read_text(encoding="utf-8"))
        plans, rounds = (_lines(directory / f"{name}.jsonl") for name in ("plans", "rounds"))
    except OSError as error:
        raise ConfigError(f"{directory} holds no run: {error}") from error
    settings = from_flat({f"{t}.{k}": v for t, keys in tables.items() for k, v in keys.items()})
    rows: dict[str, dict[str, Any]] = {}
    for line in rounds:
        for client, own in line.get("clients", {}).items():
            made = [p for p in plans if p["client"] == client and p["round"] <= line["round"]]
            if not made or not own.get(Metric.PEAK_MEMORY_BYTES) or own.get(Metric.OUT_OF_MEMORY):
                continue
            rows[client] = {
                "client": client,
                "round": line["round"],
                "plan": made[-1]["plan"],
                "device": made[-1]["device"],
                "expected-bytes": made[-1]["plan"]["peak-bytes"],
                "measured-bytes": int(own[Metric.PEAK_MEMORY_BYTES]),
                "kept-free-bytes": int(own.get("kept-free-bytes", 0)),
            }
    if not rows:
        raise ConfigError(f"{directory}: no round has a client with a measured peak yet")
    return settings, list(rows.values())


def add_components(settings: RunSettings, rows: Sequence[dict[str, Any]], measure: bool) -> None:
    """Add ``components`` to each row: bytes by name, estimated, and measured where asked for.

    Raises
    ------
    ConfigError
        If the run's model or data cannot be read.
    """
    # Imported here: the other commands should not wait for torch.
    from rankfit.estimator.memory import tail_ranks
    from rankfit.estimator.plan_search import Estimator, inputs_of
    from rankfit.estimator.tracer import TraceCache
    from rankfit.tasks import load_task
    from rankfit.tasks.base_model import load_config

    try:
        task = load_task(settings)
        config = load_config(settings.model, labels=task.labels)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    inputs, traces = inputs_of(task.example_batch(1)), TraceCache()
    estimators: dict[tuple[str, bool], Estimator] = {}
    for row in rows:
        plan = Plan.from_dict(row["plan"])
        key = (plan.moves, plan.rates.whole_head)
        if key not in estimators:
            estimators[key] = Estimator.for_run(
                settings, config, inputs, phases=(plan.moves,),
                whole_head=plan.rates.whole_head, traces=traces,
            )  # fmt: skip
        report = DeviceReport.from_dict(row["device"])
        tails = tail_ranks(plan.ranks, plan.tail_rank)
        split = _estimated(estimators[key], report, plan, tails)
        row["components"] = {"estimated": {name: getattr(split, name) for name in _PARTS}}
        if measure and report.accelerator == "cpu":
            row["components"]["measured"] = _measured(estimators[key], report, plan, tails)


def _estimated(
    estimator: "Estimator", report: DeviceReport, plan: Plan, tails: Mapping[str, int]
) -> "Breakdown":
    from rankfit.estimator.plan_search import Step

    step = Step.of(plan)
    footprint = estimator.footprint(report, step, plan.ranks, any(tails.values()))
    return footprint.breakdown(plan.ranks, tails if any(tails.values()) else 0)


def _measured(
    estimator: "Estimator", report: DeviceReport, plan: Plan, tails: Mapping[str, int]
) -> dict[str, int]:
    """Bytes of the components of the plan's step, trained here on real tensors."""
    from rankfit.estimator.components import measure_components
    from rankfit.estimator.plan_search import Step

    step = Step.of(plan)
    footprint = estimator.footprint(report, step, plan.ranks, any(tails.values()))
    return measure_components(
        footprint.traces[0].spec, plan.ranks, tails if any(tails.values()) else None
    )


def _total(row: Mapping[str, Any]) -> tuple[str, ...]:
    plan = Plan.from_dict(row["plan"])
    batch = f"{plan.micro_batch} × {plan.accumulation}"
    return (
        row["client"],
        row["device"]["name"],
        str(row["round"]),
        str(plan.rank),
        f"{batch}{' + checkpointing' if plan.checkpointing else ''}, {plan.precision}",
        f"{row['expected-bytes'] / MIB:.2f}",
        f"{row['measured-bytes'] / MIB:.2f}",
        _error(row["expected-bytes"], row["measured-bytes"]),
    )


def _split(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = row.get("components", {})
    measured = found.get("measured", {})
    return [
        (
            row["client"],
            name,
            f"{nbytes / MIB:.3f}",
            f"{measured[name] / MIB:.3f}" if measured else "–",
            _error(nbytes, measured[name]) if measured else "–",
        )
        for name, nbytes in found.get("estimated", {}).items()
    ]


def _error(estimated: int, measured: int) -> str:
    if estimated == measured:
        return "0"
    return f"{estimated / measured - 1:+.2%}" if measured else "–"


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
