"""What a run came to: figures from ``rounds.jsonl``, and the console."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from rankfit.configs.protocol import Metric
from rankfit.configs.settings import TERMINAL_WIDTH, Best, RunSettings
from rankfit.estimator.plan import Plan
from rankfit.server.best import BestRound, where
from rankfit.strategies.fleet import natural
from rankfit.strategies.strategy import HeterogeneousLora

#: Columns of tables and log lines where nobody says how wide the user's terminal is.
WIDTH = 118
#: A table in fewer columns cannot be read.
_LEAST_WIDTH = 60
#: Clients of a round that get a line each.
_CLIENT_LINES = 16


def console() -> Console:
    """Return a console on standard output, which Flower forwards.

    It has no terminal to ask: ``rankfit run`` passes the width of the user's on.
    """
    columns = os.environ.get(TERMINAL_WIDTH, "")
    width = max(int(columns), _LEAST_WIDTH) if columns.isdecimal() else WIDTH
    return Console(width=width, highlight=False, markup=False)


def show_logs() -> None:
    """Send the package's log to the console, once per process."""
    logger = logging.getLogger("rankfit")
    if not logger.handlers:
        handler = RichHandler(
            console=console(),
            show_path=False,
            omit_repeated_times=False,
            log_time_format="[%H:%M:%S]",
        )
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


Line = Mapping[str, Any]
#: Rounds whose mean is given beside the best and the final figure.
LAST = 10


@dataclass(frozen=True)
class Score:
    """One evaluation figure over a run; the best loss is the least."""

    name: str
    final: float
    best: float
    mean_of_last: float


@dataclass(frozen=True)
class ClientSummary:
    """One client over a run; bytes, seconds and counts are sums, those of memory the largest.

    ``kept_free_bytes`` is what its kind of device was measured to take above its estimate.
    """

    client: str
    ranks: str
    rounds: int
    dropped: int
    samples: int
    expected_bytes: int
    peak_bytes: int
    kept_free_bytes: int
    upload_bytes: int
    download_bytes: int
    seconds: float


def scores(rounds: Sequence[Line]) -> list[Score]:
    """Final, best and mean of the last ten of each evaluation figure; the start does not count."""
    measured = [line["evaluation"] for line in rounds if line["round"] and line.get("evaluation")]
    found = []
    for name in measured[-1] if measured else ():
        values = [evaluation[name] for evaluation in measured if name in evaluation]
        best = min(values) if name == "loss" else max(values)
        last = values[-LAST:]
        found.append(Score(name, values[-1], best, sum(last) / len(last)))
    return found


def clients(rounds: Sequence[Line]) -> list[ClientSummary]:
    """One summary for each client that was ever sampled, in the order of their names."""
    lines: dict[str, list[Line]] = {}
    for line in rounds:
        for client, own in line.get("clients", {}).items():
            lines.setdefault(client, []).append(own)
    return [_client(client, lines[client]) for client in sorted(lines, key=natural)]


def drops(rounds: Sequence[Line]) -> list[tuple[int, str, str]]:
    """(round, client, reason) of every update that was not merged."""
    return [
        (line["round"], client, own["reason"])
        for line in rounds
        for client, own in line.get("clients", {}).items()
        if not own["merged"]
    ]


def merged(rounds: Sequence[Line]) -> int:
    """Updates that were merged."""
    return sum(int(line.get("updates", 0)) for line in rounds)


def faults(rounds: Sequence[Line]) -> dict[str, int]:
    """Updates that were not merged, by kind of fault, the most frequent first."""
    kinds = Counter(
        str(own.get("kind", "not merged"))
        for line in rounds
        for own in line.get("clients", {}).values()
        if not own["merged"]
    )
    return dict(kinds.most_common())


def traffic(rounds: Sequence[Line]) -> list[tuple[int, int]]:
    """(round, bytes of adapters sent and received up to its end)."""
    total, sums = 0, []
    for line in rounds:
        total += line.get("upload-bytes", 0) + line.get("download-bytes", 0)
        sums.append((line["round"], total))
    return sums


def _client(client: str, lines: Sequence[Line]) -> ClientSummary:
    return ClientSummary(
        client=client,
        ranks=",".join(str(rank) for rank in sorted({line["rank"] for line in lines})),
        rounds=len(lines),
        dropped=sum(not line["merged"] for line in lines),
        samples=max(line.get(Metric.NUM_EXAMPLES, 0) for line in lines),
        expected_bytes=max(line.get("expected-peak-bytes", 0) for line in lines),
        peak_bytes=max(line.get(Metric.PEAK_MEMORY_BYTES, 0) for line in lines),
        kept_free_bytes=max(line.get("kept-free-bytes", 0) for line in lines),
        upload_bytes=sum(line["upload-bytes"] for line in lines),
        download_bytes=sum(line["download-bytes"] for line in lines),
        seconds=sum(line.get(Metric.TRAIN_SECONDS, 0.0) for line in lines),
    )


MIB = 2**20


def plans(strategy: HeterogeneousLora) -> Table:
    """Who trains what, and which constraint binds; clients that cannot train say why."""
    table = Table(title="Plans", title_justify="left")
    for name in ("client", "device", "memory from", "budget MiB", "expected MiB", "up / down Mbps"):
        table.add_column(name, justify="right" if "M" in name else "left", overflow="fold")
    for name in ("rank", "micro-batch"):
        table.add_column(name, justify="right")
    for name in ("base", "binds"):
        table.add_column(name)
    for client in sorted(strategy.fleet.devices, key=natural):
        report = strategy.fleet.devices[client].report
        link = f"{_mbps(report.upload_mbps)} / {_mbps(report.download_mbps)}"
        plan = strategy.plans.get(client)
        first = (Text(client), Text(report.name), report.source)  # Text: never read as markup
        if plan is None:
            reason = strategy.planner.refused.get(client, "not planned")
            budget = _mib(report.budget_bytes)
            table.add_row(*first, budget, "–", link, "–", "–", "–", Text(reason))
            continue
        batch = f"{plan.micro_batch} × {plan.accumulation}"
        table.add_row(
            *first,
            _mib(plan.budget_bytes),
            _mib(plan.peak_bytes),
            link,
            str(plan.rank),
            batch + (" + checkpointing" if plan.checkpointing else ""),
            plan.precision,
            plan.binding,
        )
    return table


def round_line(line: Mapping[str, Any], settings: RunSettings) -> str:
    """One round in one line."""
    parts = [f"round {line['round']}/{settings.run.rounds}"]
    evaluation = line.get("evaluation", {})
    parts += [f"{key} {evaluation[key]:.4f}" for key in ("accuracy", "loss") if key in evaluation]
    metric = settings.best.metric
    if metric in line.get("holdout", {}):
        parts.append(f"holdout {metric} {line['holdout'][metric]:.4f}")
    if line.get("best") == line["round"]:
        parts.append("best so far")
    if Metric.TRAIN_LOSS in line:
        parts.append(f"training {line['train-loss']:.4f}")
    ranks = sorted({client["rank"] for client in line["clients"].values()})
    total = line["updates"] + line["dropped"]
    parts.append(f"{line['updates']}/{total} at ranks " + ",".join(str(rank) for rank in ranks))
    traffic = (line["upload-bytes"] + line["download-bytes"]) / 1024
    return ", ".join([*parts, f"{traffic:.0f} KiB", f"{line['seconds']:.1f} s"])


def client_lines(line: Mapping[str, Any], plans: Mapping[str, Plan]) -> list[str]:
    """One line for each client of a round: rank, memory used of planned of all, time."""
    named = sorted(line["clients"], key=natural)
    lines = [_client_line(name, line["clients"][name], plans.get(name)) for name in named]
    more = len(lines) - _CLIENT_LINES
    return lines if more <= 0 else [*lines[:_CLIENT_LINES], f"  and {more} clients more"]


def _client_line(name: str, own: Mapping[str, Any], plan: Plan | None) -> str:
    parts = [f"rank {own['rank']}"]
    if plan is not None:
        used = _mib(own[Metric.PEAK_MEMORY_BYTES]) if Metric.PEAK_MEMORY_BYTES in own else "–"
        parts.append(
            f"{used} of {_mib(plan.peak_bytes)} MiB planned of {_mib(plan.budget_bytes)} MiB"
        )
        parts.append(f"micro-batch {plan.micro_batch} × {plan.accumulation}")
    if Metric.TRAIN_SECONDS in own:
        parts.append(f"{own[Metric.TRAIN_SECONDS]:.1f} s")
    if not own["merged"]:
        parts.append(f"dropped: {own.get('kind', 'not merged')}")
    return f"  {name}: " + ", ".join(parts)


def stop_line(number: int, settings: RunSettings, best: BestRound) -> str:
    """Why a run ends before its last round."""
    rules = settings.best
    return (
        f"stopped after round {number} of {settings.run.rounds}: {best.waited} evaluations in a "
        f"row without a better {rules.metric} on {where(rules)} than {best.value:.4f} of round "
        f"{best.round} (best.patience {rules.patience})"
    )


def results(strategy: HeterogeneousLora, rounds: Sequence[Mapping[str, Any]]) -> Table:
    """What each client did over the run: rank, measured peak beside the expected one, drops."""
    table = Table(title="Clients", title_justify="left")
    table.add_column("client")
    for name in (
        "rank", "rounds", "dropped", "samples", "expected MiB", "measured MiB", "up KiB",
        "down KiB", "train s",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for own in clients(rounds):
        plan = strategy.plans.get(own.client)
        table.add_row(
            Text(own.client),
            own.ranks,
            str(own.rounds),
            str(own.dropped),
            str(own.samples),
            _mib(plan.peak_bytes) if plan else "–",
            _mib(own.peak_bytes),
            f"{own.upload_bytes / 1024:.0f}",
            f"{own.download_bytes / 1024:.0f}",
            f"{own.seconds:.1f}",
        )
    return table


def closing(path: Path, rounds: Sequence[Mapping[str, Any]], rules: Best, chosen: BestRound) -> str:
    """Best, final and mean of the last evaluations, what was not merged, and where all lies."""
    lines = [
        f"test {score.name}: final {score.final:.4f}, best {score.best:.4f}, "
        f"mean of the last ten {score.mean_of_last:.4f}"
        for score in scores(rounds)
    ]
    kinds, done = faults(rounds), merged(rounds)
    if kinds:
        dropped = sum(kinds.values())
        few = "only " if done < dropped else ""
        listed = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
        lines.append(f"{few}{done} of {done + dropped} updates were merged; not: {listed}")
    lines.append(f"PEFT adapter: {path / 'checkpoint'}")
    if chosen.round:
        lines.append(
            f"best round: {chosen.round}, {rules.metric} {chosen.value:.4f} on {where(rules)}; "
            f"its PEFT adapter: {path / 'best'}"
        )
    lines.append(f"report: {path / 'report.html'}")
    return "\n".join(lines)


def _mib(size: int) -> str:
    """MiB, with the digits that matter on tiny models."""
    return f"{size / MIB:.2f}" if size < 100 * MIB else f"{size / MIB:.0f}"


def _mbps(value: float) -> str:
    return f"{value:g}" if value else "–"


#: Files in the run directory.
PARTITION, PLOT = "partition.json", "partition.svg"
#: Classes that the plot tells apart; the others are drawn as one.
_SHOWN = 20


@dataclass(frozen=True)
class Holdings:
    """Which training examples each client holds.

    Attributes
    ----------
    parts : sequence of NDArray
        Indices into the training set, by client.
    labels : NDArray
        Class of every training example, (n,).
    class_names : sequence of str
        Empty where labels are no classes.
    lengths : sequence of sequence of int
        Tokens of some of each client's examples; empty of pictures.
    """

    parts: Sequence[NDArray[np.int64]]
    labels: NDArray[np.int64]
    class_names: Sequence[str]
    lengths: Sequence[Sequence[int]] = ()

    def counts(self) -> NDArray[np.int64]:
        """Examples by client and class, (clients, classes)."""
        first = int(self.labels.min(initial=0))
        classes = max(len(self.class_names), int(self.labels.max(initial=0)) + 1 - first)
        return np.stack(
            [np.bincount(self.labels[part] - first, minlength=classes) for part in self.parts]
        )

    def save(self, folder: Path) -> None:
        """Write the indices, the counts and the plot into a run directory."""
        record = {
            "examples": len(self.labels),
            "classes": list(self.class_names),
            "clients": [
                {
                    "partition": number,
                    "samples": len(part),
                    "counts": row,
                    "lengths": self._lengths(number),
                    "indices": part.tolist(),
                }
                for number, (part, row) in enumerate(
                    zip(self.parts, self.counts().tolist(), strict=True)
                )
            ],
        }
        (folder / PARTITION).write_text(json.dumps(record), encoding="utf-8")
        self.draw(folder / PLOT)

    def _lengths(self, client: int) -> dict[str, int]:
        """Median and largest number of tokens, and of how many examples; {} of pictures."""
        own = self.lengths[client] if self.lengths else ()
        if not own:
            return {}
        return {"median": int(np.median(own)), "longest": max(own), "measured": len(own)}

    def draw(self, file: Path) -> None:
        """Draw one bar a client, its classes stacked; the ending of the name is the format."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # not pyplot: no display, no global state

        counts = self.counts()
        names = list(self.class_names) or [str(i) for i in range(counts.shape[1])]
        if counts.shape[1] > _SHOWN:
            rest = counts[:, _SHOWN - 1 :].sum(axis=1, keepdims=True)
            names = [*names[: _SHOWN - 1], f"{counts.shape[1] - _SHOWN + 1} others"]
            counts = np.concatenate([counts[:, : _SHOWN - 1], rest], axis=1)
        figure = Figure(figsize=(8, 1.2 + 0.22 * len(counts)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(counts))
        for number, name in enumerate(names):
            width = counts[:, number]
            colour = colormaps["tab20"](number)
            axes.barh(range(len(counts)), width, left=left, color=colour, label=name)
            left += width
        axes.set_xlabel("training examples")
        axes.set_ylabel("partition")
        axes.invert_yaxis()
        if len(names) > 1:
            figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(file)
