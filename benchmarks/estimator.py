"""How long an estimate takes: a new model, another device, a fleet. CPU seconds of one process.

``python benchmarks/estimator.py`` prints a table and writes JSON. Imports and the first trace of
the process are not counted. ``--full-depth`` also records each model at its full depth, which takes
minutes, and compares every field of the two traces.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from rankfit.configs.settings import from_flat
from rankfit.estimator.depth import solve_deep
from rankfit.estimator.fit import Estimator
from rankfit.estimator.report import DeviceReport
from rankfit.estimator.solve import solve
from rankfit.estimator.spec import InputSpec
from rankfit.estimator.tracer import TraceCache

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
    row["first device"] = seconds(lambda: estimator.fit(device((low + high) / 2)))
    sizes = np.random.default_rng(0).uniform(0.9 * low, 1.1 * high, fleet)
    times = [seconds(lambda size=size: estimator.fit(device(size))) for size in sizes]  # type: ignore[misc]
    row["fleet"] = sum(times)
    row["another device"] = float(np.median(times))
    return row


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
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "estimator.json"
    )
    arguments = parser.parse_args()
    warm = estimator_of("bert-base")
    TraceCache()(replace(warm.spec, accelerator="cuda"))
    rows = []
    for name in arguments.models.split(","):
        row = measure(name, arguments.fleet)
        if arguments.full_depth:
            row |= compare(name)
        rows.append(row)
    table = Table(*rows[0], title=f"CPU seconds; fleet of {arguments.fleet} devices")
    for row in rows:
        cells = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    Console().print(table)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, np)}
    record = {
        "rows": rows,
        "fleet": arguments.fleet,
        "versions": versions,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
