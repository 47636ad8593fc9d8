"""The estimator against a GPU: predicted and measured memory, and plans that must hold under a cap.

``python benchmarks/gpu_memory.py`` needs one CUDA GPU, no flwr and no weights. It trains a grid of
models × attention × precision × checkpointing × ranks, and some steps in fp16, under autocast and
with each optimizer (no quantised bases: these need weights), and compares three peaks with the
caching allocator's own statistics: live (``requested_bytes``), blocks (``allocated_bytes``) and
reserved. Then, in fresh processes whose allocator is capped to 1, 2, 4 and 8 GiB, the planned rank
must train 200 steps on texts of random lengths, and the least rank whose live bytes are above the
cap must run out of memory. It prints tables and writes ``benchmarks/results/gpu_memory.json`` with
hardware and versions; ``tests/estimator/test_gpu_memory.py`` holds the estimator to that file. On a
stub GPU (``python -m tests.stub_gpu.gpu STATE python benchmarks/gpu_memory.py --out …``) it takes
minutes as well. Without a GPU it says so, writes nothing, and exits with 3.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from rankfit.configs.settings import from_flat
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.components import real_step
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.memory import Footprint
from rankfit.estimator.meta_kernels import kernel_family
from rankfit.estimator.plan_search import Estimate, Estimator
from rankfit.estimator.step import filled_batch, run_steps
from rankfit.estimator.step_spec import InputSpec, StepSpec
from rankfit.estimator.tracer import TraceCache

MIB, GIB = 2**20, 2**30
OUT = Path(__file__).parent / "results" / "gpu_memory.json"
NO_GPU = 3
#: Optimizer steps under a cap.
STEPS = 200
TRACES = TraceCache()


@dataclass(frozen=True)
class Case:
    """One training step of the grid; ``rank`` in every query and value projection."""

    model: str
    attention: str
    precision: str
    checkpointing: bool
    rank: int
    batch: int
    autocast: str = "none"
    optimizer: str = "adamw"


#: Name → kind, config, batch, tokens (0 = images of 224 × 224). Random weights.
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "deit-small": (
        "image-classification",
        {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12,
         "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 224}, 32, 0,
    ),
    "bert-base": ("text-classification", {"model_type": "bert"}, 16, 256),
    "llama-3.2-1b": (
        "causal-lm",
        {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
         "vocab_size": 128256, "tie_word_embeddings": True}, 2, 512,
    ),
}  # fmt: skip
CAPS_GIB = (1, 2, 4, 8)
#: The optimizer that needs bitsandbytes, where it is installed.
EIGHT_BIT = ("adamw-8bit",) if importlib.util.find_spec("bitsandbytes") else ()


def grid() -> Iterator[Case]:
    """The cases, in the order in which they run."""
    for model, attention, precision, checkpointing, rank in product(
        MODELS, ("sdpa", "eager"), ("fp32", "bf16"), (False, True), (8, 128)
    ):
        yield Case(model, attention, precision, checkpointing, rank, MODELS[model][2])
    for model in MODELS:
        plain = Case(model, "sdpa", "fp32", False, 8, MODELS[model][2])
        yield replace(plain, precision="fp16")
        for autocast in ("bf16", "fp16"):
            yield replace(plain, autocast=autocast)
        yield replace(plain, autocast="bf16", checkpointing=True)
        for optimizer in ("adamw-fused", "adafactor", "sgd", *EIGHT_BIT):
            yield replace(plain, optimizer=optimizer, rank=128)


@cache
def _estimator(case: Case) -> Estimator:
    kind, fields, _, tokens = MODELS[case.model]
    config = transformers.AutoConfig.for_model(**fields)
    if tokens:
        names = ("input_ids", "attention_mask")
        inputs = tuple(InputSpec(name, (tokens,), "int64") for name in names)
        labels = (tokens,) if kind == "causal-lm" else ()
    else:
        inputs, labels = (InputSpec("pixel_values", (3, 224, 224), "float32"),), ()
    settings = from_flat(
        {
            "lora.rank": 256,
            "train.batch-size": case.batch,
            "train.gradient-checkpointing": case.checkpointing,
            "train.autocast": case.autocast,
            "train.optimizer": case.optimizer,
            "model.attention": case.attention,
            "model.precision": case.precision,
            "head.mode": "frozen",
            "plan.search": "",
        }
    )
    return Estimator.for_run(
        settings,
        config,
        (*inputs, InputSpec("labels", labels, "int64")),
        kind=kind,
        traces=TRACES,  # type: ignore[arg-type]
    )


def estimator_of(case: Case) -> Estimator:
    """Estimator of a case's step, for ranks up to 256."""
    return _estimator(replace(case, rank=0))


def spec_of(case: Case, capability: str) -> StepSpec:
    """Step spec of a case on the kernels of a GPU."""
    family = kernel_family(capability)
    return replace(estimator_of(case).spec, accelerator="cuda", family=family)


def predict(case: Case, capability: str) -> dict[str, int]:
    """Peaks in bytes that the estimator expects, CUDA context apart; needs no GPU."""
    footprint = Footprint((TRACES(spec_of(case, capability)),), Calibration.cuda(capability))
    replayed = footprint.replays(case.rank)[0]
    return {
        "live": footprint.live(case.rank),
        "blocks": replayed.allocated,
        "reserved": replayed.reserved,
    }


def errors(predicted: Mapping[str, int], measured: Mapping[str, int]) -> dict[str, float]:
    """Relative error of each predicted peak that was measured."""
    return {name: predicted[name] / measured[name] - 1 for name in predicted if name in measured}


def slack_rank(footprint: Footprint, cap_bytes: int, limit: int) -> int | None:
    """Least rank up to ``limit`` whose live bytes are above a cap: it must fail; None = none is."""
    for rank in range(1, limit + 1):
        if footprint.live(rank) > cap_bytes:
            return rank
    return None


def measure(case: Case, *, steps: int = 0, cap_bytes: int | None = None) -> dict[str, int]:
    """Train on the GPU; peaks in bytes as the caching allocator counts them.

    Parameters
    ----------
    steps : int
        Optimizer steps at least, on texts of random lengths (0 = the two of the trace, at full
        length).

    Raises
    ------
    torch.OutOfMemoryError
        If the step does not fit.
    """
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    if cap_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))
    torch.cuda.reset_peak_memory_stats()
    spec = spec_of(case, hardware()["capability"])
    model = real_step(spec, dict.fromkeys(spec.targets, case.rank), device="cuda")
    torch.cuda.empty_cache()  # tying frees weights, whose blocks the step would use again
    torch.cuda.reset_peak_memory_stats()
    lengths = random.Random(0) if steps else None
    for _ in range(max(1, -(-steps // 2))):
        run_steps(spec, model, lambda: _batch(spec, lengths))
    stats = torch.cuda.memory_stats()
    return {
        "live": stats["requested_bytes.all.peak"],
        "blocks": stats["allocated_bytes.all.peak"],
        "reserved": stats["reserved_bytes.all.peak"],
    }


def _batch(spec: StepSpec, lengths: random.Random | None) -> dict[str, torch.Tensor]:
    """A batch on the GPU; with ``lengths`` its texts are as long as the longest of a batch is."""
    batch = filled_batch(spec, "cuda")
    if lengths is None or "input_ids" not in batch:
        return batch
    most = batch["input_ids"].shape[1]
    longest = lengths.randint(most // 8, most)
    return {
        name: tensor[:, :longest].clone() if tensor.ndim > 1 else tensor
        for name, tensor in batch.items()
    }


def hardware() -> dict[str, Any]:
    """The GPU as torch and NVML see it; ``context`` = NVML's bytes of this process − reserved."""
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total": properties.total_memory,
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}".encode())
        report["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                report["context"] = process.usedGpuMemory - torch.cuda.memory_reserved()
    except Exception as error:  # noqa: BLE001 - NVML is a report here, not a need
        report["nvml"] = str(error)
    return report


def capped(model: str, cap_gib: int, capability: str) -> dict[str, Any]:
    """Plan for a capped device, and try the plan and the least rank above it in fresh processes."""
    kind_batch = MODELS[model][2]
    precision = "bf16" if model.startswith("llama") else "fp32"
    case = Case(model, "sdpa", precision, model.startswith("llama"), 1, kind_batch)
    terms, cap = Calibration.cuda(capability), cap_gib * GIB
    total = cap + terms.context
    report = DeviceReport(
        "capped", "cuda", "", "", capability, total, total, 0, 0, "declared"
    )  # the cap is the allocator's: the context comes on top
    fit = estimator_of(case).fit(report)
    record: dict[str, Any] = {"model": model, "cap": cap}
    if not isinstance(fit, Estimate):
        return record | {"planned": None, "reason": fit.reason}
    footprint = estimator_of(case).footprint(report, estimator_of(case).steps[0])
    above = slack_rank(footprint, cap, 256)
    record |= {"planned": fit.plan.rank, "trained": _fresh(case, fit.plan.rank, cap)}
    return record | {
        "above": above,
        "failed": None if above is None else not _fresh(case, above, cap),
    }


def _fresh(case: Case, rank: int, cap: int) -> bool:
    """Whether :data:`STEPS` steps train in a process of their own under a cap."""
    request = json.dumps({**asdict(case), "rank": rank})
    command = [sys.executable, __file__, "--child", request, "--cap", str(cap)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the process for {request} failed: {done.stderr[-2000:]}")
    return done.returncode == 0


def _child(request: str, cap: int) -> int:
    try:
        measure(Case(**json.loads(request)), steps=STEPS, cap_bytes=cap)
    except torch.OutOfMemoryError:
        return 1
    return 0


def run() -> dict[str, Any]:
    """Measure the grid and the caps; the record that is written."""
    device = hardware()
    rows = []
    for case in grid():
        row: dict[str, Any] = {
            "case": asdict(case),
            "predicted": predict(case, device["capability"]),
        }
        try:
            row["measured"] = measure(case)
        except torch.OutOfMemoryError as error:
            row["out-of-memory"] = str(error).splitlines()[0]
        rows.append(row)
    caps = [capped(model, cap, device["capability"]) for model in MODELS for cap in CAPS_GIB]
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    return {
        "hardware": hardware(), "versions": versions | {"cuda": torch.version.cuda},
        "python": platform.python_version(), "rows": rows, "caps": caps,
    }  # fmt: skip


def show(record: Mapping[str, Any]) -> list[Table]:
    """Tables of a record."""
    peaks = Table("case", "live", "blocks", "reserved", title="predicted / measured − 1")
    for row in record["rows"]:
        name = " ".join(str(value) for value in row["case"].values())
        if "measured" not in row:
            peaks.add_row(name, "out of memory", "", "")
            continue
        off = errors(row["predicted"], row["measured"])
        peaks.add_row(name, *(f"{off[key]:+.2%}" for key in ("live", "blocks", "reserved")))
    caps = Table("model", "cap GiB", "planned rank", "trains", "rank above", "fails", title="caps")
    for row in record["caps"]:
        cells = (row.get(key) for key in ("planned", "trained", "above", "failed"))
        caps.add_row(row["model"], str(row["cap"] // GIB), *(str(cell) for cell in cells))
    return [peaks, caps]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit status 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    console = Console()
    if not torch.cuda.is_available():
        console.print(
            f"No GPU is here (torch {torch.__version__} sees no CUDA device), so nothing was "
            "measured and nothing was written. Run this on a machine with one CUDA GPU."
        )
        return NO_GPU
    if options.child:
        return _child(options.child, options.cap)
    record = run()
    for table in show(record):
        console.print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
