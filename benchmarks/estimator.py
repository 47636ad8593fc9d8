"""How long an estimate takes: a new model, another device, a fleet. CPU seconds of one process.

``python benchmarks/estimator.py`` prints a table and writes JSON. Imports and the first trace of
the process are not counted. Every device of the fleet has a memory size of its own. Side by side:

- ``--full-depth`` also records each model at its full depth, and compares every field of the two
  traces;
- ``--profiled MODEL`` also profiles ten training steps of a model on this CPU with real tensors,
  which is how HRALoRA (CCGrid 2026) fits its estimator, there on a GPU;
- ``--scan N`` also replays every rank from the live bound down for N devices, and counts those that
  the look-up gives less;
- ``--anchors`` compares what other estimators say instead (see ``anchors.py``).
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anchors
import numpy as np
import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from rankfit.client.host import processor_name
from rankfit.configs.settings import from_flat
from rankfit.estimator.depth import solve_deep
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.meta_libraries import make_optimizer
from rankfit.estimator.plan_search import Estimator
from rankfit.estimator.step import filled_batch
from rankfit.estimator.step_spec import InputSpec
from rankfit.estimator.trace import solve
from rankfit.estimator.tracer import TraceCache

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
#: Published shapes; no weights and no hub.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit-small": (
        "image-classification",
        {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12,
         "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 224},
    ),
    "bert-base": ("text-classification", {"model_type": "bert"}),
    "llama-3.2-3b": (
        "causal-lm",
        {"model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 8192,
         "vocab_size": 128256, "tie_word_embeddings": True},
    ),
    "llama-3.1-70b": (
        "causal-lm",
        {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
         "vocab_size": 128256},
    ),
}  # fmt: skip


def estimator_of(name: str, **changes: Any) -> Estimator:
    """Estimator at batch 4 of 512 tokens (or 32 images), adapters on query and value."""
    kind, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(**fields)
    image = kind == "image-classification"
    flat = {"lora.rank": 64, "train.batch-size": 32 if image else 4, "plan.search": ""}
    if not image:
        flat |= {"model.precision": "bf16" if kind == "causal-lm" else "fp32"}
        flat |= {"train.gradient-checkpointing": kind == "causal-lm"}
    labels = InputSpec("labels", (512,) if kind == "causal-lm" else (), "int64")
    words = [InputSpec(each, (512,), "int64") for each in ("input_ids", "attention_mask")]
    pixels = [InputSpec("pixel_values", (3, 224, 224), "float32")]
    inputs = (*(pixels if image else words), labels)
    return Estimator.for_run(from_flat(flat | changes), config, inputs, kind=kind)  # type: ignore[arg-type]


def device(nbytes: float) -> DeviceReport:
    """An H100 with this much memory."""
    total = int(nbytes)
    return DeviceReport("d", "cuda", "H100", "", "9.0", total, total, 0, 0, "declared")


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process that a piece of work takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(name: str, fleet: int) -> dict[str, Any]:
    """Seconds for a new model, for a second device, and for a fleet of distinct memory sizes."""
    estimator = estimator_of(name)
    step = estimator.steps[0]
    row: dict[str, Any] = {"model": name}
    row["new model"] = seconds(lambda: estimator.footprint(device(1), step))
    footprint = estimator.footprint(device(1), step)
    row["events"] = len(footprint.traces[0].events)
    low, high = (footprint.expected(rank, 0, 2**62) for rank in (1, 64))
    sizes = np.random.default_rng(0).uniform(0.9 * low, 1.1 * high, fleet)
    times = [seconds(lambda size=size: estimator.fit(device(size))) for size in sizes]  # type: ignore[misc]
    row["first device"] = times[0]
    row["another device"] = float(np.median(times))
    row["99 % of devices"] = float(np.quantile(times, 0.99))
    row["slowest device"] = max(times)
    row["fleet"] = sum(times)
    return row


def scan(name: str, devices: int) -> dict[str, Any]:
    """How many devices a scan of all ranks gives more than the look-up does, and how much more."""
    estimator = estimator_of(name)
    footprint = estimator.footprint(device(1), estimator.steps[0])
    low, high = footprint.needed(1), footprint.expected(64, 0, 2**62)
    lost = []
    for size in np.random.default_rng(1).uniform(0.999 * low, 1.001 * high, devices).tolist():
        budget = int(size)
        holding = (rank for rank in range(64, 0, -1) if footprint.holds(rank, 0, budget))
        lost.append(next(holding, 0) - footprint.largest(64, budget))
    return {"scanned": devices, "below the scan": int(np.count_nonzero(lost)), "by": max(lost)}


#: Steps that are profiled, each at another rank.
PROFILED = 10


def profiled(name: str) -> float:
    """Seconds of ten profiled training steps on real CPU tensors, models included."""
    spec = replace(estimator_of(name).spec, accelerator="cpu")
    ranks = np.linspace(4, 256, PROFILED).astype(int).tolist()

    def work() -> None:
        for rank in ranks:
            model = anchors.real_model(spec, rank)
            optimizer = make_optimizer(spec, model)
            batch = filled_batch(spec)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return seconds(work)


def compare(name: str) -> dict[str, Any]:
    """Seconds at full depth, and whether both traces are the same in every field."""
    spec = replace(estimator_of(name).spec, accelerator="cuda", micro_batch=2)
    deep, full = solve_deep(spec, (2, 3)), None
    began = time.process_time()
    full = solve(spec, (2, 3))
    taken = time.process_time() - began
    fields = ("events", "column", "amount", "sampled", "trained", "state")
    same = all(np.array_equal(getattr(deep, each), getattr(full, each)) for each in fields)
    return {"full depth": taken, "equal": same}


def main() -> None:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", type=int, default=10_000, help="devices of the fleet")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--full-depth", action="store_true")
    parser.add_argument("--profiled", default="", help="model whose steps are profiled on this CPU")
    parser.add_argument("--scan", type=int, default=0, help="devices compared with a full scan")
    parser.add_argument("--anchors", action="store_true", help="compare with other estimators")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, np)}
    record: dict[str, Any] = {
        "versions": versions,
        "processor": processor_name(),
        "python": platform.python_version(),
    }
    if arguments.anchors:
        record |= {"configurations": anchors.run()}
        return _write(arguments.out or RESULTS / "estimator-anchors.json", record)
    warm = estimator_of("bert-base")
    TraceCache()(replace(warm.spec, accelerator="cuda"))
    gc.freeze()  # a full collection over torch's modules would fall on some device by chance
    rows = []
    for name in arguments.models.split(","):
        row = measure(name, arguments.fleet)
        if arguments.full_depth:
            row |= compare(name)
        if arguments.profiled:
            row["ten profiled steps"] = profiled(name) if name == arguments.profiled else "–"
        if arguments.scan:
            row |= scan(name, arguments.scan)
        rows.append(row)
    table = Table(*rows[0], title=f"CPU seconds; fleet of {arguments.fleet} devices")
    for row in rows:
        cells = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    Console().print(table)
    record |= {"rows": rows, "fleet": arguments.fleet}
    _write(arguments.out or RESULTS / "estimator.json", record)


def _write(out: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
