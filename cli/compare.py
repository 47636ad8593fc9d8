"""``rankfit compare``: methods side by side at equal budgets, and what came of it."""

import json
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rankfit.configs.compose import compose, parse_override
from rankfit.configs.settings import ConfigError, RunSettings, from_flat, to_flat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: a method with settings of its own (an ablation, a drift control)."""

    label: str
    overrides: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read ``name[+key=value…]``, for example ``hralora+method.without=fisher``.

        Raises
        ------
        ConfigError
            For an unknown method or setting.
        """
        from rankfit.strategies.methods import find

        name, *rest = text.split("+")
        overrides: dict[str, Any] = {"method.name": find(name.strip()).name}
        for part in rest:
            overrides |= parse_override(part)
        return cls(text.strip(), overrides)


@dataclass(frozen=True)
class Result:
    """One run: accuracies, bytes, and what else is compared.

    Attributes
    ----------
    best, final, last : float
        Of the metric over the rounds; ``last`` is the mean of the last ten.
    upload_bytes, download_bytes : int
        Over the whole run.
    trained_parameters : float
        Mean over rounds of the values that the round's clients trained together.
    seconds : float
        Of training and merging.
    aggregation_error : float
        Mean over rounds of the distance from the true weighted mean, relative to it.
    curve : list of (round, bytes up to then, metric)
    """

    label: str
    seed: int
    best: float
    final: float
    last: float
    upload_bytes: int
    download_bytes: int
    trained_parameters: float
    seconds: float
    aggregation_error: float
    curve: list[tuple[int, int, float]]


def settings_of(base: RunSettings, entry: Entry, seed: int, folder: Path) -> RunSettings:
    """Settings of one run of a comparison; one that was begun is resumed."""
    name = f"{_slug(entry.label)}-seed{seed}"
    begun = (folder / name / "config.toml").exists()
    place = {"run.directory": str(folder), "run.name": name, "run.seed": seed, "run.resume": begun}
    return from_flat(to_flat(base) | dict(entry.overrides) | place)


def finished(settings: RunSettings) -> bool:
    """Whether a run has all its rounds."""
    lines = read_rounds(settings)
    return bool(lines) and lines[-1]["round"] >= settings.run.rounds


def read_rounds(settings: RunSettings) -> list[dict[str, Any]]:
    """Lines of a run's ``rounds.jsonl``; none before it has begun."""
    file = Path(settings.run.directory) / settings.run.name / "rounds.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def result_of(entry: Entry, settings: RunSettings, metric: str) -> Result:
    """Sum up a finished run.

    Raises
    ------
    ConfigError
        If the metric was not measured.
    """
    # Imported here: with it come torch and the strategies, which other commands do without.
    from rankfit.server.reporting import LAST

    curve, traffic = [], 0
    trained = [line for line in read_rounds(settings) if line["round"] > 0]
    for line in trained:
        traffic += line["upload-bytes"] + line["download-bytes"]
        if metric in line.get("evaluation", {}):
            curve.append((line["round"], traffic, float(line["evaluation"][metric])))
    if not curve:
        raise ConfigError(f"{entry.label}: no evaluation gave {metric!r}; see server.evaluate")
    values = [value for _, _, value in curve]
    errors = [
        line["diagnostics"]["mean-error"]
        for line in trained
        if "mean-error" in line.get("diagnostics", {})
    ]
    return Result(
        label=entry.label,
        seed=settings.run.seed,
        best=min(values) if metric == "loss" else max(values),
        final=values[-1],
        last=statistics.mean(values[-LAST:]),
        upload_bytes=sum(line["upload-bytes"] for line in trained),
        download_bytes=sum(line["download-bytes"] for line in trained),
        trained_parameters=statistics.mean(line["trained-parameters"] for line in trained),
        seconds=sum(line["train-seconds"] for line in trained),
        aggregation_error=statistics.mean(errors) if errors else float("nan"),
        curve=curve,
    )


#: Column → (attribute, how a value is shown, what it is multiplied with).
COLUMNS = {
    "best": ("best", ".4f", 1.0),
    "final": ("final", ".4f", 1.0),
    "last ten": ("last", ".4f", 1.0),
    "up MiB": ("upload_bytes", ".2f", 2.0**-20),
    "down MiB": ("download_bytes", ".2f", 2.0**-20),
    "parameters a round": ("trained_parameters", ".0f", 1.0),
    "seconds": ("seconds", ".1f", 1.0),
    "aggregation error": ("aggregation_error", ".3f", 1.0),
}


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Cells of the table, mean ± standard deviation over the seeds; best mean of last ten first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.label, []).append(result)
    ordered = sorted(groups, key=lambda label: -statistics.mean(r.last for r in groups[label]))
    return [
        [label, *(_cell(groups[label], *column) for column in COLUMNS.values())]
        for label in ordered
    ]


def _cell(results: Sequence[Result], attribute: str, shown: str, factor: float) -> str:
    values = [getattr(result, attribute) * factor for result in results]
    mean = format(statistics.mean(values), shown)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), shown)}"


def markdown(results: Sequence[Result]) -> str:
    """The table in Markdown."""
    lines = [["method", *COLUMNS], ["---"] * (len(COLUMNS) + 1), *rows(results)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def latex(results: Sequence[Result]) -> str:
    """The table in LaTeX (booktabs)."""
    body = [" & ".join(cells).replace("±", r"$\pm$").replace("_", r"\_") for cells in rows(results)]
    head = " & ".join(["method", *COLUMNS])
    columns = "l" + "r" * len(COLUMNS)
    middle = " \\\\\n".join(body)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{middle} \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def write(folder: Path, results: Sequence[Result], metric: str) -> None:
    """Write the raw figures, both tables and both plots of a comparison into its folder."""
    text = json.dumps({"metric": metric, "results": [asdict(r) for r in results]}, indent=1)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(results), encoding="utf-8")
    (folder / "comparison.tex").write_text(latex(results), encoding="utf-8")
    _plot(folder / "rounds.svg", results, 0, "round", metric)
    _plot(folder / "bytes.svg", results, 1, "MiB sent and received", metric)


def _plot(file: Path, results: Sequence[Result], column: int, title: str, metric: str) -> None:
    """One line a method: the metric, mean over the seeds, against rounds or bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label in dict.fromkeys(result.label for result in results):
        curves = [result.curve for result in results if result.label == label]
        points = list(_means(zip(*curves, strict=False), column))
        axes.plot([x for x, _ in points], [y for _, y in points], label=label)
    axes.set_xlabel(title)
    axes.set_ylabel(metric)
    axes.legend()
    figure.savefig(file)


def _means(
    points: Iterable[tuple[tuple[int, int, float], ...]], column: int
) -> Iterable[tuple[float, float]]:
    for group in points:
        x = statistics.mean(float(point[column]) for point in group)
        yield (x / 2**20 if column else x), statistics.mean(point[2] for point in group)


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in label)


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
    table = Table("method", *COLUMNS)
    for cells in rows(results):
        table.add_row(*cells)
    Console(markup=False).print(table)
    Console(markup=False).print(f"Tables, plots and JSON: {out}", highlight=False, soft_wrap=True)


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
            settings = settings_of(base, entry, seed, out.resolve())
            if not finished(settings):
                log.info("comparison: %s, seed %d", entry.label, seed)
                runner(settings)
            results.append(result_of(entry, settings, metric))
            write(out, results, metric)
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
