"""Small models, their specs, and the same training step on real CPU tensors."""

from collections.abc import Mapping
from typing import Any

from transformers import BertConfig, PreTrainedConfig, ViTConfig

from rankfit.estimator.calibration import Calibration
from rankfit.estimator.components import real_step
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.recording import WORKSPACE, LiveMemory, record
from rankfit.estimator.step import filled_batch, run_steps
from rankfit.estimator.step_spec import InputSpec, StepSpec, canonical
from rankfit.tasks import base_model

MIB = 2**20
IMAGE, TEXT = "image-classification", "text-classification"
LABELS = InputSpec("labels", (), "int64")


def vit_config(**changes: Any) -> PreTrainedConfig:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": 5,
        "problem_type": "single_label_classification",
    }
    return ViTConfig(**(sizes | changes))


def deit_small_config(classes: int = 1000) -> PreTrainedConfig:
    """deit-small-patch16-224, without a hub."""
    return vit_config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        patch_size=16,
        num_labels=classes,
    )


def bert_config() -> PreTrainedConfig:
    return BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        max_position_embeddings=32,
        num_labels=5,
        problem_type="single_label_classification",
    )


def images(size: int) -> tuple[InputSpec, ...]:
    return (InputSpec("pixel_values", (3, size, size), "float32"), LABELS)


def texts(length: int) -> tuple[InputSpec, ...]:
    names = ("input_ids", "attention_mask")
    return (*(InputSpec(name, (length,), "int64") for name in names), LABELS)


def step_spec(architecture: str, *, head: bool = True, **changes: Any) -> StepSpec:
    """Spec of a step of a small ViT or BERT, or of DeiT-small, on query and value."""
    config, kind, inputs = {
        "vit": (vit_config(), IMAGE, images(16)),
        "bert": (bert_config(), TEXT, texts(16)),
        "deit-small": (deit_small_config(), IMAGE, images(224)),
    }[architecture]
    base = base_model.build_empty(config, kind, attention="sdpa", precision="fp32")
    fields: dict[str, Any] = {
        "config": canonical(config.to_dict()),
        "kind": kind,
        "accelerator": "cpu",
        "targets": base_model.target_modules(base, "default"),
        "heads": base_model.head_modules(base) if head else (),
        "inputs": inputs,
        "micro_batch": 4,
    }
    return StepSpec(**(fields | changes))


def uneven(targets: tuple[str, ...]) -> dict[str, int]:
    """Ranks that differ from module to module."""
    return {module: 3 * index + 1 for index, module in enumerate(targets)}


def real_peak(
    spec: StepSpec,
    ranks: Mapping[str, int],
    remainder_ranks: Mapping[str, int] | None = None,
    cap_bytes: int | None = None,
) -> int:
    """Peak of live bytes of the same step on real CPU tensors."""
    model = real_step(spec, ranks, remainder_ranks)
    with LiveMemory(cap_bytes=cap_bytes).baseline(model) as live:
        run_steps(spec, model, lambda: filled_batch(spec))
    return live.peak


def device(mib: float, accelerator: str = "cpu", **changes: Any) -> DeviceReport:
    """A device with this much memory, all free."""
    total = int(mib * MIB)
    fields: dict[str, Any] = {
        "client": "client-1",
        "accelerator": accelerator,
        "name": "test",
        "uuid": "",
        "compute_capability": "9.0" if accelerator == "cuda" else "",
        "total_bytes": total,
        "free_bytes": total,
        "reserved_bytes": 0,
        "processes": 0,
        "source": "declared",
    }
    return DeviceReport(**(fields | changes))


def recorded_peak(spec: StepSpec, ranks: Mapping[str, int], calibration: Calibration) -> int:
    """Peak of one recording at these very ranks."""
    recording = record(spec, ranks)
    values = {
        "": 1,
        WORKSPACE: calibration.cublas_workspace,
        "scratch": calibration.attention_scratch,
    }
    live = peak = 0
    for index, begins, _ in recording.events:
        allocation = recording.allocations[index]
        live += (1 if begins else -1) * allocation.nbytes * values[allocation.term]
        peak = max(peak, live)
    return peak
