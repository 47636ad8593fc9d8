"""What other estimators say of four LoRA steps, beside ours and the live peak of the real CPU step.

Run by ``python benchmarks/estimator.py --anchors``. What can be run here is run; what needs a GPU
is computed from its published formula, or left out with the reason.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from rankfit.configs.settings import from_flat
from rankfit.estimator.allocator import replay
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.components import real_step
from rankfit.estimator.memory import Footprint
from rankfit.estimator.meta_libraries import make_optimizer
from rankfit.estimator.plan_search import Estimator
from rankfit.estimator.recording import LiveMemory, Recorder
from rankfit.estimator.step import build, filled_batch, run_steps
from rankfit.estimator.step_spec import InputSpec, StepSpec
from rankfit.estimator.tracer import TraceCache

log = logging.getLogger(__name__)

MIB = 2**20
RANK = 16
#: Ranks at which HRALoRA's regression is fitted.
FITTED = (4, 64)
TRACES = TraceCache()


def _texts(length: int, labels: tuple[int, ...]) -> tuple[InputSpec, ...]:
    names = ("input_ids", "attention_mask")
    words = tuple(InputSpec(name, (length,), "int64") for name in names)
    return (*words, InputSpec("labels", labels, "int64"))


#: Name → kind, config, inputs, settings. Float32, SDPA, AdamW, query and value.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], tuple[InputSpec, ...], dict[str, Any]]] = {
    "DeiT-small, 8 images": (
        "image-classification",
        {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12,
         "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 224},
        (InputSpec("pixel_values", (3, 224, 224), "float32"), InputSpec("labels", (), "int64")),
        {"train.batch-size": 8},
    ),
    "BERT-base, 8 × 128": (
        "text-classification", {"model_type": "bert"}, _texts(128, ()), {"train.batch-size": 8},
    ),
    "GPT-2, 4 × 128": (
        "causal-lm", {"model_type": "gpt2"}, _texts(128, (128,)), {"train.batch-size": 4},
    ),
    "Llama-160M, 2 × 256, checkpointing": (
        "causal-lm",
        {"model_type": "llama", "hidden_size": 768, "num_hidden_layers": 12,
         "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 32000},
        _texts(256, (256,)),
        {"train.batch-size": 2, "train.gradient-checkpointing": True},
    ),
}  # fmt: skip


def spec_of(name: str) -> StepSpec:
    """Step spec of a configuration, on CPU kernels."""
    kind, fields, inputs, flat = CONFIGURATIONS[name]
    config = transformers.AutoConfig.for_model(**fields)
    settings = from_flat({"lora.rank": RANK, "plan.search": "", **flat})
    return Estimator.for_run(settings, config, inputs, kind=kind).spec  # type: ignore[arg-type]


def real_model(spec: StepSpec, rank: int) -> nn.Module:
    """The adapted model with random weights on the CPU."""
    return real_step(spec, dict.fromkeys(spec.targets, rank))


def live_peak(spec: StepSpec, rank: int) -> int:
    """Live bytes of two real training steps at their peak."""
    model = real_model(spec, rank)
    with LiveMemory().baseline(model) as live:
        run_steps(spec, model, lambda: filled_batch(spec))
    return live.peak


def ours(spec: StepSpec) -> int:
    """The trace's live peak: what the real CPU step is compared with."""
    return TRACES(spec).peak_live(RANK)


def ours_reserved(spec: StepSpec) -> int:
    """What the same step reserves on a GPU of compute capability 8.x, CUDA context apart."""
    trace = TRACES(replace(spec, accelerator="cuda"))
    return Footprint((trace,), Calibration.cuda("8.0")).replays(RANK)[0].reserved


def accelerate_estimate(spec: StepSpec) -> int:
    """``accelerate estimate-memory``, training with Adam: four times the model, no LoRA."""
    size, _ = calculate_maximum_sizes(_base(spec))
    return max(estimate_training_usage(size, "float32").values())


def deepspeed_formula(spec: StepSpec) -> int:
    """DeepSpeed's ``estimate_zero2_model_states_mem_needs`` on one GPU: 4 P + 16 P."""
    return 20 * sum(p.numel() for p in {id(p): p for p in _base(spec).parameters()}.values())


def mem_tracker(spec: StepSpec) -> int:
    """Torch's MemTracker around one real step; its peak on the CPU."""
    model = real_model(spec, RANK)
    optimizer = make_optimizer(spec, model)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            model(**filled_batch(spec)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    peak: int = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak


def xmem_way(spec: StepSpec) -> int:
    """XMem (Middleware 2025), rebuilt: the allocations of a real CPU run through the allocator."""
    model = real_model(spec, RANK)
    recorder = Recorder(spec)
    recorder.baseline(model)
    with recorder:
        run_steps(spec, model, lambda: filled_batch(spec), recorder.enter)
    sizes = [allocation.nbytes for allocation in recorder.allocations]
    events = [index if begins else -1 - index for index, begins, _ in recorder.events]
    return replay(sizes, events).reserved


def hralora_way(spec: StepSpec) -> int:
    """HRALoRA's regression in CPU terms: a line through steps profiled at two ranks."""
    low, high = FITTED
    first, second = (live_peak(spec, rank) for rank in FITTED)
    return int(first + (second - first) * (RANK - low) / (high - low))


def _base(spec: StepSpec) -> nn.Module:
    base: nn.Module = build(spec, dict.fromkeys(spec.targets, 1)).unload()
    return base


#: In the order of the columns.
ESTIMATORS: dict[str, Callable[[StepSpec], int]] = {
    "RankFit, live": ours,
    "RankFit, reserved on a GPU": ours_reserved,
    "accelerate estimate-memory": accelerate_estimate,
    "DeepSpeed's formula": deepspeed_formula,
    "torch MemTracker": mem_tracker,
    "xMem's way, reserved": xmem_way,
    "HRALoRA's regression": hralora_way,
}


def run() -> list[dict[str, Any]]:
    """Ask every estimator for every configuration; print a table; bytes or the error by name."""
    records = []
    table = Table("configuration", "real CPU step", *ESTIMATORS, title="MiB at rank 16")
    for name in CONFIGURATIONS:
        spec = spec_of(name)
        said: dict[str, int | str] = {"real CPU step": live_peak(spec, RANK)}
        for estimator, ask in ESTIMATORS.items():
            said[estimator] = _ask(ask, spec)
        records.append({"configuration": name, "bytes": said})
        table.add_row(name, *_cells(said))
    Console(width=200).print(table)
    return records


def _ask(ask: Callable[[StepSpec], int], spec: StepSpec) -> int | str:
    """What an estimator says; where it fails, how: that is a result too."""
    try:
        return ask(spec)
    except Exception as error:  # noqa: BLE001 - whatever a foreign tool raises
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _cells(said: Mapping[str, int | str]) -> list[str]:
    real = said["real CPU step"]
    assert isinstance(real, int)
    return [
        f"{value / MIB:.1f} ({value / real - 1:+.1%})" if isinstance(value, int) else value[:40]
        for value in said.values()
    ]
