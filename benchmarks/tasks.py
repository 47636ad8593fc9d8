"""A federated run of each kind of task, beside the majority class and central training.

``python -m benchmarks.tasks --data FOLDER --work FOLDER [CASE…]`` runs the cases through Flower's
simulation (``rankfit run``), trains LoRA of the global rank centrally on as many samples, and
writes ``benchmarks/results/tasks.json``; cases that are not asked for keep their figures.
``--data`` is a folder with ``text/``, ``image/`` and ``commonsense/`` (parquet); ``--vit`` what
``benchmarks/pretrain_vit.py`` wrote.
"""

import argparse
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Image

import rankfit
from benchmarks.machine import write_record
from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.cli.checkpoints import by_client
from rankfit.client.app import app as client_app
from rankfit.configs.compose import compose
from rankfit.configs.settings import to_flat
from rankfit.server import reporting as summary
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import federate
from rankfit.server.run_directory import SavedRun
from rankfit.tasks.task import Task

RESULTS = Path(__file__).resolve().parent / "results" / "tasks.json"
_PACKAGES = ("torch", "transformers", "peft", "flwr")
#: Links that give every third client a quarter, half and all of the rank.
_TEN = ("simulation.clients=10", "server.clients-per-round=5", "server.min-clients=10",
        "partition.kind=dirichlet", "partition.alpha=0.5", "partition.min-samples=20",
        # One process: two cores at most, and figures that do not depend on the machine's load.
        "simulation.cpus-per-client=2")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One task: the run's settings, and what its accuracy is called."""

    parts: tuple[str, ...]
    says: str


def cases(data: Path, work: Path, vit: Path | None) -> dict[str, Callable[[], Case]]:
    """The cases by name; a case makes its model or data when it is asked for."""
    text = data / "text"
    found: dict[str, Callable[[], Case]] = {
        "banking77-minilm": lambda: Case(
            (
                "banking77-minilm", f"data.source={text}", "data.train=banking77_train",
                "data.test=banking77_test", "run.rounds=8", *_TEN,
            ),
            "ten intents of banking77, MiniLM",
        ),
        "trec-minilm": lambda: Case(
            (
                "banking77-minilm", f"data.source={text}", "data.train=trec6_train",
                "data.test=trec6_test", "data.classes=0", "run.rounds=8", *_TEN,
            ),
            "TREC-6, MiniLM",
        ),
        "commonsense-tiny": lambda: commonsense(data / "commonsense", work),
    }  # fmt: skip
    if vit is not None:
        found["cifar10-held-out"] = lambda: held_out(data / "image", work, vit)
    return found


def commonsense(data: Path, work: Path) -> Case:
    """A Llama of random weights, and a tokenizer of the training questions."""
    folder = work / "tiny-llama"
    records = Dataset.from_parquet(str(data / "commonsense_train.parquet"))
    texts = [f"{row['instruction']}\n{row['output']}" for row in records.select(range(0, 16000, 8))]
    save_model(folder, save_tokenizer(folder, texts, 1024), hidden=128, layers=2, deviation=0.1)
    return Case(
        (
            "task.kind=causal-lm", "task.suite=commonsense", "task.evaluate=likelihood",
            f"model.source={folder}", f"data.source={data}", "data.train=commonsense_train",
            "data.test=commonsense_test", "data.label-column=task", "data.max-length=192",
            "data.train-samples=1500", "data.test-samples=300", "lora.targets=all-linear",
            "lora.rank=8", "lora.alpha=16.0", "train.learning-rate=3e-3", "train.batch-size=16",
            "run.rounds=8", "server.evaluate-every=4",
            "fleet.upload-mbps=1.2, 2.4, 8", "plan.upload-seconds=0.5", *_TEN,
        ),
        "ARC-Easy, BoolQ and OpenBookQA, a Llama of random weights (likelihood of the choices)",
    )  # fmt: skip


def held_out(data: Path, work: Path, vit: Path) -> Case:
    """Classes of CIFAR-10 that the backbone has not seen."""
    seen = int(json.loads((vit / "pretraining.json").read_text())["classes"])
    folder = work / "held-out"
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        table = Dataset.from_parquet(str(data / f"cifar10_{part}.parquet"))
        names = table.features["label"].names[seen:]
        table = table.cast_column("image", Image(decode=False))
        table = table.filter(lambda label: label >= seen, input_columns="label")
        labels = [label - seen for label in table["label"]]
        table = table.remove_columns("label").add_column("label", labels)
        table = table.cast_column("label", ClassLabel(names=names)).cast_column("image", Image())
        table.to_parquet(folder / f"{part}.parquet")
    return Case(
        (
            f"model.source={vit}", f"data.source={folder}", "lora.rank=8", "lora.alpha=16.0",
            "train.learning-rate=3e-3", "train.batch-size=32", "run.rounds=20",
            "data.train-samples=2400", "data.test-samples=800", "server.evaluate-every=4",
            "fleet.upload-mbps=0.4, 0.8, 4", "plan.upload-seconds=0.5", *_TEN,
        ),
        f"CIFAR-10, the {10 - seen} classes that the backbone has not seen",
    )  # fmt: skip


def federated(case: Case, place: Sequence[str]) -> Path:
    """Run a case through Flower's simulation."""
    return rankfit.run(*case.parts, *place)


def samples_seen(lines: Sequence[dict[str, Any]], batch: int) -> int:
    """Samples that the clients of a run trained on, counted as often as they were used."""
    own = [client for line in lines for client in line.get("clients", {}).values()]
    return sum(min(int(c["steps"]) * batch, int(c["num-examples"])) for c in own if c["merged"])


def central(case: Case, place: Sequence[str], samples: int) -> Path:
    """Train the same adapter in one place on as many samples: one client that holds everything."""
    settings = compose([*case.parts, *place])
    batch = settings.train.batch_size
    steps = math.ceil(samples / batch)
    alone = ("simulation.clients=1", "server.clients-per-round=1", "server.min-clients=1",
             "partition.kind=iid", "run.rounds=1", f"train.steps={steps}", "method.name=fedit",
             "fleet.memory-mib=", "fleet.upload-mbps=", "fleet.download-mbps=",
             "plan.upload-seconds=0", "plan.download-seconds=0")  # fmt: skip
    settings = compose([*case.parts, *alone, *place])
    grid = InProcessGrid(client_app, to_flat(settings), [{"partition-id": 0, "num-partitions": 1}])
    federate(grid, settings)
    return Path(settings.run.directory) / settings.run.name


def majority(task: Task) -> float:
    """Test accuracy of always giving the most frequent answer of the training set.

    Of several groups of questions, the mean over the groups of their own most frequent answers.
    """
    if task.settings.task.kind != "causal-lm":
        most = Counter(task.train.labels.tolist()).most_common(1)[0][0]
        return float((task.test.labels == most).mean())
    shares = []
    for group in sorted(set(task.test.labels.tolist())):
        answers = {
            name: [
                split.examples.inputs[row]["answer"]
                for row, label in enumerate(split.labels)
                if label == group
            ]
            for name, split in (("train", task.train), ("test", task.test))
        }
        most = Counter(answers["train"]).most_common(1)[0][0]
        shares.append(answers["test"].count(most) / len(answers["test"]))
    return sum(shares) / len(shares)


def measure(name: str, case: Case, work: Path) -> dict[str, Any]:
    """All figures of one case."""
    began = time.monotonic()
    path = federated(case, (f"run.directory={work}", f"run.name={name}"))
    seconds = time.monotonic() - began
    saved = SavedRun.open(path)
    lines = saved.lines()
    samples = samples_seen(lines, saved.settings.train.batch_size)
    began = time.monotonic()
    alone = central(case, (f"run.directory={work}", f"run.name={name}-central"), samples)
    central_seconds = time.monotonic() - began
    score = next(score for score in summary.scores(lines) if score.name == "accuracy")
    ranks = sorted({c["rank"] for line in lines for c in line.get("clients", {}).values()})
    result = {
        "case": name,
        "says": case.says,
        "through": "rankfit run (Flower simulation)",
        "rounds": saved.round,
        "clients": saved.settings.simulation.clients,
        "clients-per-round": saved.settings.server.clients_per_round,
        "partition": f"Dirichlet({saved.settings.partition.alpha:g})",
        "ranks": ranks,
        "samples": samples,
        "majority": majority(saved.task),
        "before": lines[0]["evaluation"]["accuracy"],
        "after": {"final": score.final, "best": score.best, "mean-of-last-10": score.mean_of_last},
        "central": SavedRun.open(alone).lines()[-1]["evaluation"]["accuracy"],
        "evaluation": lines[-1]["evaluation"],
        "seconds": round(seconds, 1),
        "central-seconds": round(central_seconds, 1),
    }
    if saved.settings.task.kind == "causal-lm":
        written = SavedRun.open(path, overrides=["task.evaluate=generation",
                                                 "task.max-new-tokens=12"])  # fmt: skip
        rows = range(len(written.task.test))
        before = written.task.evaluate(written.base, written.task.test, rows,
                                       torch.device("cpu"), 64)  # fmt: skip
        result["by-generation-before"] = before["accuracy"]
        result["by-generation"] = written.evaluator().on(written.adapter, written.task.test)
    return result


def personal(work: Path) -> dict[str, Any]:
    """Digits, each client with three of ten classes: its own head beside the shared one."""
    shared = ("quickstart", "simulation.clients=10", "server.min-clients=10", "run.rounds=15",
              "server.clients-per-round=10", "partition.kind=pathological",
              "partition.classes-per-client=3", "partition.test=alike", "server.evaluate=clients",
              "simulation.cpus-per-client=2")  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for mode in ("trained", "local"):
        place = (f"run.directory={work}", f"run.name=personal-{mode}", f"head.mode={mode}")
        path = rankfit.run(*shared, *place)
        figures = by_client(SavedRun.open(path))
        found[mode] = {client: one["accuracy"] for client, one in figures.items()}
    names = list(found["local"])
    return {
        "case": "personal-heads",
        "says": "scikit-learn digits, three of ten classes a client, ten clients, 15 rounds; each "
        "client measured on test digits of its own classes",
        "through": "rankfit run (Flower simulation)",
        "clients": {c: {"shared": found["trained"][c], "own": found["local"][c]} for c in names},
        "mean": {
            "shared": sum(found["trained"].values()) / len(names),
            "own": sum(found["local"].values()) / len(names),
        },
    }


def main() -> None:
    """Run the cases that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vit", type=Path)
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = cases(options.data, options.work, options.vit)
    for name in options.cases or [*known, "personal-heads"]:
        if name == "personal-heads":
            result = personal(options.work)
        else:
            result = measure(name, known[name](), options.work)
        write(result)
        print(json.dumps(result, indent=1))


def write(result: dict[str, Any]) -> None:
    """Put the figures of one case into the results."""
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": []}
    kept = [one for one in record["results"] if one["case"] != result["case"]]
    record = {
        "benchmark": "tasks",
        "versions": {name: version(name) for name in _PACKAGES},
        "hardware": {"machine": platform.machine(), "cpu-threads": 1},
        "results": sorted([*kept, result], key=lambda one: str(one["case"])),
    }
    write_record(RESULTS, record)


if __name__ == "__main__":
    main()
