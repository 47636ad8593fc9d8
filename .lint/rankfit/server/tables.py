"""What the user sees on the console: plans, a line a round, results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rankfit.server import summary
from rankfit.strategies.fleet import natural
from rankfit.strategies.heterogeneous_lora import HeterogeneousLora

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
        first = (client, report.name, report.source)
        if plan is None:
            reason = strategy.planner.refused.get(client, "not planned")
            budget = _mib(report.budget_bytes)
            table.add_row(*first, budget, "–", link, "–", "–", "–", reason)
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


def round_line(line: Mapping[str, Any], rounds: int) -> str:
    """One round in one line."""
    parts = [f"round {line['round']}/{rounds}"]
    evaluation = line.get("evaluation", {})
    parts += [f"{key} {evaluation[key]:.4f}" for key in ("accuracy", "loss") if key in evaluation]
    if "train-loss" in line:
        parts.append(f"training {line['train-loss']:.4f}")
    ranks = sorted({client["rank"] for client in line["clients"].values()})
    total = line["updates"] + line["dropped"]
    parts.append(f"{line['updates']}/{total} at ranks " + ",".join(str(rank) for rank in ranks))
    traffic = (line["upload-bytes"] + line["download-bytes"]) / 1024
    return ", ".join([*parts, f"{traffic:.0f} KiB", f"{line['seconds']:.1f} s"])


def results(strategy: HeterogeneousLora, rounds: Sequence[Mapping[str, Any]]) -> Table:
    """What each client did over the run: rank, measured peak beside the expected one, drops."""
    table = Table(title="Clients", title_justify="left")
    table.add_column("client")
    for name in (
        "rank", "rounds", "dropped", "samples", "expected MiB", "measured MiB", "up KiB",
        "down KiB", "train s",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for own in summary.clients(rounds):
        plan = strategy.plans.get(own.client)
        table.add_row(
            own.client,
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


def closing(path: Path, rounds: Sequence[Mapping[str, Any]]) -> str:
    """Best, final and mean of the last ten evaluations, and where the adapter lies."""
    lines = [
        f"test {score.name}: final {score.final:.4f}, best {score.best:.4f}, "
        f"mean of the last ten {score.mean_of_last:.4f}"
        for score in summary.scores(rounds)
    ]
    lines.append(f"PEFT adapter: {path / 'checkpoint'}")
    lines.append(f"report: {path / 'report.html'}")
    return "\n".join(lines)


def _mib(size: int) -> str:
    """MiB, with the digits that matter on tiny models."""
    return f"{size / MIB:.2f}" if size < 100 * MIB else f"{size / MIB:.0f}"


def _mbps(value: float) -> str:
    return f"{value:g}" if value else "–"
