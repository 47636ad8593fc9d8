"""What a run came to, from ``rounds.jsonl``: figures for the console and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankfit.strategies.fleet import natural

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
        samples=max(line.get("num-examples", 0) for line in lines),
        expected_bytes=max(line.get("expected-peak-bytes", 0) for line in lines),
        peak_bytes=max(line.get("peak-memory-bytes", 0) for line in lines),
        kept_free_bytes=max(line.get("kept-free-bytes", 0) for line in lines),
        upload_bytes=sum(line["upload-bytes"] for line in lines),
        download_bytes=sum(line["download-bytes"] for line in lines),
        seconds=sum(line.get("train-seconds", 0.0) for line in lines),
    )
