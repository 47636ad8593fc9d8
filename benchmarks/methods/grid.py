"""A grid of runs: learning rates chosen on a validation split, then methods × settings × seeds.

Shared by the comparisons of this folder. Every run is a run directory that is kept when done and
resumed where it was cut, so a grid can be stopped at any moment. Each run gives two rows of
figures: without drift controls, and with a moving average of the global adapter and head, which
changes nothing in the training and is evaluated beside it. A method has a rate of its own for each
row: what is averaged can be trained faster.

The runs and ``methods-NAME.json`` with the curve of every run stay in the folder ``--out``; what is
committed is the :func:`summary` of it, in ``benchmarks/results/methods-NAME.json``.
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, write_record
from rankfit.cli.compare import Entry, finished, read_rounds, settings_of
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError, RunSettings

log = logging.getLogger(__name__)

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: Rounds whose mean is given beside the best.
LAST = 10
#: What both rows need: the average is evaluated, and so is what it is taken of.
AVERAGED = ("server.average=0.8", "server.evaluate-unaveraged=true", "server.diagnostics=false")
#: Row of the table → prefix of its figures.
CONTROLS = {"plain": "unaveraged-", "average-0.8": ""}
#: What a line of the summary holds: the mean over the seeds of the mean of the last ten rounds and
#: its standard deviation; and the bytes of a whole run at the rate of ``plain``.
FIGURES = (
    *(f"{control} {figure}" for control in CONTROLS for figure in ("mean", "deviation")),
    "upload MiB", "download MiB",
)  # fmt: skip
#: What it holds of the choice of a rate: the rate, and its mean accuracy on the validation splits.
CHOICE = tuple(f"{control} {figure}" for control in CONTROLS for figure in ("rate", "accuracy"))


@dataclass(frozen=True)
class Setting:
    """One column of the comparison.

    Attributes
    ----------
    name : str
        In the results.
    parts : tuple of str
        What all its runs share, as for ``rankfit run``.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A comparison.

    Attributes
    ----------
    name : str
        Of the results: ``methods-NAME.json``.
    methods : tuple of str
        Rows, as :meth:`~rankfit.cli.compare.Entry.parse` reads them.
    settings : tuple of Setting
        Columns.
    validation : Mapping[str, Setting]
        By the first part of a setting's name (up to ``/``): where its rates are chosen. Its data is
        split off from the training data; the test set is no part of it.
    rates : tuple of float
        Learning rates that each method has to choose from.
    runner : Callable
        Carries out one run.
    seeds, validation_seeds : tuple of int
        Of the comparison, and of the validation splits and the runs on them.
    more : Mapping[str, tuple of str]
        By setting's name further rows.
    """

    name: str
    methods: tuple[str, ...]
    settings: tuple[Setting, ...]
    validation: Mapping[str, Setting]
    rates: tuple[float, ...]
    runner: Callable[[RunSettings], object]
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_seeds: tuple[int, ...] = (100,)
    more: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def carry_out(self, out: Path) -> None:
        """Run what is not done; the records are written after every setting and method."""
        torch.set_num_threads(1)
        for setting in self.settings:
            task = setting.name.split("/")[0]
            for method in (*self.methods, *self.more.get(setting.name, ())):
                try:
                    rates = self._rates(task, method, out)
                    found = [self._row(setting, method, rates, s, out) for s in self.seeds]
                except ConfigError as error:
                    log.warning("%s: %s cannot run: %s", setting.name, method, error)
                    told = str(error).replace(f"{out.resolve()}/", "")
                    self._note(out, "refused", setting.name, method, told)
                    continue
                self._note(out, "results", setting.name, method, {"rates": rates, "runs": found})
        sys.stdout.write(table(self.known()))

    def known(self) -> dict[str, Any]:
        """What the summary holds so far."""
        return _read(RESULTS / f"methods-{self.name}.json")

    def _rates(self, task: str, method: str, out: Path) -> dict[str, float]:
        """By row the rate of the best mean of the last ten rounds over the validation splits."""
        scores = {}
        for rate in self.rates:
            setting = self.validation[task]
            runs = [self._one(setting, method, rate, seed, out) for seed in self.validation_seeds]
            scores[rate] = {control: [run[control]["last"] for run in runs] for control in CONTROLS}
        self._note(
            out, "rates", task, method, {f"{rate:g}": found for rate, found in scores.items()}
        )
        return {c: max(scores, key=lambda rate: sum(scores[rate][c])) for c in CONTROLS}

    def _row(
        self, setting: Setting, method: str, rates: Mapping[str, float], seed: int, out: Path
    ) -> dict[str, Any]:
        """Figures of one seed, each control from the run at its own rate; bytes are plain's."""
        runs = {rate: self._one(setting, method, rate, seed, out) for rate in set(rates.values())}
        own = {control: runs[rate][control] for control, rate in rates.items()}
        return runs[rates["plain"]] | own

    def _one(
        self, setting: Setting, method: str, rate: float, seed: int, out: Path
    ) -> dict[str, Any]:
        base = compose([*setting.parts, *AVERAGED])
        entry = Entry.parse(f"{method}+train.learning-rate={rate:g}")
        folder = out / setting.name.replace("/", "-")
        settings = settings_of(base, entry, seed, folder.resolve())
        if not finished(settings):
            self.runner(settings)
        return figures(read_rounds(settings), seed)

    def _note(self, out: Path, part: str, first: str, second: str, value: object) -> None:
        """Add to the whole record in ``out``, and bring the committed summary up to date."""
        file = out / f"methods-{self.name}.json"
        record = _read(file) or {
            "command": f"python -m benchmarks.methods.{self.name.replace('-', '_')} --out FOLDER",
            "seeds": list(self.seeds), "rates-to-choose-from": list(self.rates),
            "validation-seeds": list(self.validation_seeds), "results": {},
        }  # fmt: skip
        record["settings"] = {s.name: _told(s) for s in self.settings}
        record |= machine("torch", "transformers", "peft", "flwr")
        record.setdefault(part, {}).setdefault(first, {})[second] = value
        if part == "results":
            record.get("refused", {}).get(first, {}).pop(second, None)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_record(RESULTS / f"methods-{self.name}.json", updated(self.known(), summary(record)))


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is committed of a whole record: a line for each method.

    ``results`` has lines of :data:`FIGURES` by setting, ``rates`` lines of :data:`CHOICE` by task.
    """
    settings = record["settings"]
    shared = [
        p for p in next(iter(settings.values())) if all(p in own for own in settings.values())
    ]
    kept = {key: value for key, value in record.items() if key not in ("results", "rates")}
    return kept | {
        "shared-settings": shared,
        "settings": {name: [p for p in own if p not in shared] for name, own in settings.items()},
        "results: figures": FIGURES,
        "results": {
            column: {method: _figures(found) for method, found in rows.items()}
            for column, rows in record["results"].items()
        },
        "rates: figures": CHOICE,
        "rates": {
            task: {method: _choice(scores) for method, scores in rows.items()}
            for task, rows in record.get("rates", {}).items()
        },
    }


def _figures(found: Mapping[str, Any]) -> list[float]:
    """One line of :data:`FIGURES`."""
    line: list[float] = []
    for control in CONTROLS:
        values = [run[control]["last"] for run in found["runs"]]
        line += [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
    for way in ("upload-bytes", "download-bytes"):
        line.append(round(statistics.mean(run[way] for run in found["runs"]) / 2**20, 2))
    return line


def _choice(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> list[float]:
    """One line of :data:`CHOICE`."""
    line: list[float] = []
    for control in CONTROLS:
        best = max(scores, key=lambda rate: sum(scores[rate][control]))
        line += [float(best), statistics.mean(scores[best][control])]
    return line


def updated(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary in which lines that were not measured now are those of before."""
    merged = dict(now)
    for part in ("settings", "results", "rates", "refused"):
        if part in before or part in now:
            rows = {first: dict(own) if isinstance(own, dict) else own
                    for first, own in before.get(part, {}).items()}  # fmt: skip
            for first, own in now.get(part, {}).items():
                rows[first] = {**rows.get(first, {}), **own} if isinstance(own, dict) else own
            merged[part] = rows
    return merged


def _told(setting: Setting) -> list[str]:
    """The parts without the places of this machine."""
    return [part for part in setting.parts if ".source=" not in part]


def carry_out(grid: Grid, asked: argparse.Namespace) -> None:
    """Do what the options ask for."""
    if asked.settings:
        kept = tuple(s for s in grid.settings if s.name.startswith(tuple(asked.settings)))
        grid = replace(grid, settings=kept)
    if asked.table:
        sys.stdout.write(table(grid.known()))
    else:
        grid.carry_out(asked.out)


def figures(lines: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Figures of one run from its ``rounds.jsonl``: by row best and mean of the last ten rounds."""
    trained = [line for line in lines if line["round"] > 0]
    found: dict[str, Any] = {
        "seed": seed,
        "upload-bytes": sum(line["upload-bytes"] for line in trained),
        "download-bytes": sum(line["download-bytes"] for line in trained),
    }
    end = trained[-1]["round"]
    for control, prefix in CONTROLS.items():
        curve = {
            line["round"]: round(line["evaluation"][f"{prefix}accuracy"], 4)
            for line in trained
            if line.get("evaluation")
        }
        last = [value for number, value in curve.items() if number > end - LAST]
        found[control] = {
            "best": max(curve.values()), "last": round(statistics.mean(last), 4), "curve": curve,
        }  # fmt: skip
    return found


def table(known: Mapping[str, Any]) -> str:
    """Markdown: mean of the last ten rounds over the seeds ± standard deviation, a table a row."""
    text = ""
    for control in CONTROLS:
        columns = list(known["results"])
        methods = list(dict.fromkeys(m for column in columns for m in known["results"][column]))
        cells = {c: {m: _last(known, c, m, control) for m in methods} for c in columns}
        order = sorted(methods, key=lambda m: -statistics.mean(cells[c][m][0] for c in columns))
        text += (
            f"\n{control}\n\n| method | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
        )
        for method in order:
            row = (_shown(method, cells[column]) for column in columns)
            text += f"| {method} | {' | '.join(row)} |\n"
    return text


def _last(known: Mapping[str, Any], column: str, method: str, control: str) -> tuple[float, float]:
    """Mean and standard deviation; (−1, 0) where there is no run."""
    line = known["results"][column].get(method)
    if line is None:
        return -1.0, 0.0
    mean = FIGURES.index(f"{control} mean")
    return line[mean], line[mean + 1]


def _shown(method: str, column: Mapping[str, tuple[float, float]]) -> str:
    """One cell; bold where it is first, or within the first's standard deviation of it."""
    mean, spread = column[method]
    if mean < 0:
        return "–"
    first, first_spread = max(column.values())
    text = f"{mean:.3f} ± {spread:.3f}"
    return f"**{text}**" if mean >= first - first_spread else text


def arguments(text: str, extra: Iterable[tuple[str, str]] = ()) -> argparse.Namespace:
    """Options of a comparison: ``--out``, ``--table``, and folders that it reads from."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--settings", nargs="*", help="only settings whose name begins so")
    for name, says in extra:
        parser.add_argument(name, type=Path, required=True, help=says)
    return parser.parse_args()
