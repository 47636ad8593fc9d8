"""``rankfit compare``: methods side by side at equal budgets."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rankfit.cli import comparison
from rankfit.cli.comparison import Entry, Result
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError, RunSettings, to_flat

log = logging.getLogger(__name__)

#: Carries out one run.
Runner = Callable[[RunSettings], object]


def compare(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PRESET… [KEY=VALUE…]", help="What all runs share, as for `rankfit run`."
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated: name[+key=value…], e.g. hralora+method.without=fisher"),
    ] = "rankfit,fedit,flexlora,hetlora",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0",
    out: Annotated[Path, typer.Option(help="Folder of the runs and the results.")] = Path(
        "comparison"
    ),
    metric: Annotated[str, typer.Option(help="Evaluation figure that is compared.")] = "accuracy",
    ray: Annotated[bool, typer.Option("--ray", help="Through Flower and Ray.")] = False,
) -> None:
    """Run methods side by side; runs that are done are kept, begun ones are resumed."""
    results = run_all(
        compose(parts), _entries(methods), _seeds(seeds), out, metric, over_ray if ray else here
    )
    table = Table("method", *comparison.COLUMNS)
    for cells in comparison.rows(results):
        table.add_row(*cells)
    Console().print(table)
    Console().print(f"Tables, plots and JSON: {out}", highlight=False, soft_wrap=True)


def run_all(
    base: RunSettings,
    entries: list[Entry],
    seeds: list[int],
    out: Path,
    metric: str,
    runner: Runner,
) -> list[Result]:
    """Run what is not done yet, seed by seed; results are written after every run."""
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in seeds:
        for entry in entries:
            settings = comparison.settings_of(base, entry, seed, out.resolve())
            if not comparison.finished(settings):
                log.info("comparison: %s, seed %d", entry.label, seed)
                runner(settings)
            results.append(comparison.result_of(entry, settings, metric))
            comparison.write(out, results, metric)
    return results


def here(settings: RunSettings) -> None:
    """Run in this process: the real ServerApp side and ClientApp, without transport."""
    from rankfit.client.app import app as client_app
    from rankfit.server.in_process import InProcessGrid
    from rankfit.server.loop import federate

    count = settings.simulation.clients
    nodes: list[dict[str, str | int | float | bool]] = [
        {"partition-id": i, "num-partitions": count} for i in range(count)
    ]
    federate(InProcessGrid(client_app, to_flat(settings), nodes), settings)


def over_ray(settings: RunSettings) -> None:
    """Run as a simulation of Flower's, on Ray."""
    from rankfit.cli.api import submit

    submit(settings, None)


def _entries(text: str) -> list[Entry]:
    entries = [Entry.parse(part) for part in text.split(",") if part.strip()]
    if not entries:
        raise ConfigError("--methods names none; `rankfit methods` lists them")
    return entries


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(
            f"--seeds: expected comma-separated whole numbers, got {text!r}"
        ) from error
    if not seeds:
        raise ConfigError("--seeds names none")
    return seeds
