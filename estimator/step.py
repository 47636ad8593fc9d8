"""The training step that is estimated, run on whatever device its model lies on."""

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig

from rankfit.estimator.meta_libraries import adapt, make_optimizer, quantize
from rankfit.estimator.step_spec import InputSpec, StepSpec
from rankfit.tasks import base_model
from rankfit.tasks.kronecker import OUTER, wrap
from rankfit.tasks.lora import inject, set_training, train_only

Phase = Literal["load", "forward", "backward", "optimizer"]

#: Forward passes per optimizer step that show the steady state of any accumulation.
PASSES = {False: 1, True: 2}
#: Optimizer steps: the second one finds the optimizer's state in place.
STEPS = 2


def run_steps(
    spec: StepSpec,
    model: nn.Module,
    batch: Callable[[], Mapping[str, Tensor]],
    enter: Callable[[Phase], None] = lambda phase: None,
) -> torch.optim.Optimizer:
    """Train two optimizer steps.

    Parameters
    ----------
    model : nn.Module
        PEFT model in training mode whose call returns ``loss`` for a batch with ``labels``.
    batch : callable
        Makes the next batch.
    enter : callable
        Told of each phase as it begins.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(spec, model)
    passes = PASSES[spec.accumulates]
    for _ in range(STEPS):
        for _ in range(passes):
            enter("forward")
            inputs = batch()
            with _autocast(spec, trained[0].device.type):
                loss = model(**inputs).loss
            enter("backward")
            (loss / passes).backward()
            del loss, inputs
        enter("optimizer")
        if spec.clips:
            nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def _autocast(spec: StepSpec, device: str) -> torch.autocast:
    """As the trainer does; on meta tensors that of the CPU is the switch."""
    lower = None if spec.autocast == "none" else base_model.DTYPES[spec.autocast]
    device = "cpu" if device == "meta" else device
    return torch.autocast(device, dtype=lower, enabled=lower is not None)


def empty_batch(spec: StepSpec, device: str = "meta") -> dict[str, Tensor]:
    """Build a batch of the spec's shapes; what is floating comes in the type of the base."""
    return {
        item.name: torch.empty(
            (spec.micro_batch, *item.shape), dtype=_type_of(spec, item), device=device
        )
        for item in spec.inputs
    }


def filled_batch(spec: StepSpec, device: str = "cpu") -> dict[str, Tensor]:
    """A batch of zeros; where texts may be padded, one is."""
    batch = {name: tensor.zero_() for name, tensor in empty_batch(spec, device).items()}
    if "attention_mask" in batch:
        batch["attention_mask"][:] = 1
        if spec.padded:
            batch["attention_mask"][0, -3:] = 0
    return batch


def _type_of(spec: StepSpec, item: InputSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, item.dtype)
    if not dtype.is_floating_point or item.name == "labels":
        return dtype
    return base_model.DTYPES[spec.precision]


def build(
    spec: StepSpec, ranks: Mapping[str, int], remainder_ranks: Mapping[str, int] | None = None
) -> PeftModel:
    """Build base, adapters and heads of a step on the meta device, in training mode.

    Raises
    ------
    ModelError
        If a module cannot be adapted or the architecture has no such classifier.
    """
    try:
        config = AutoConfig.for_model(**json.loads(spec.config))
    except ValueError as error:
        raise base_model.ModelError(
            f"the model cannot be built without code of its own: {error}. The estimator knows the "
            "architectures of transformers alone, with model.trust-remote-code or without it"
        ) from error
    if spec.checkpointing:
        config.use_cache = False  # as the model does itself, with a warning
    base = base_model.build_empty(
        config, spec.kind, attention=spec.attention, precision=spec.precision
    )
    wrap(base, [name.removesuffix(OUTER) for name in spec.heads if name.endswith(OUTER)])
    if spec.quantization != "none":
        quantize(base, spec)
    model = inject(
        base,
        ranks,
        scale=1.0,
        dropout=spec.dropout,
        heads=spec.heads,
        remainder_ranks=remainder_ranks,
    )
    if spec.quantization != "none":
        adapt(model)
    if spec.trainable != "both":
        train_only(model, spec.trainable)
    if spec.checkpointing:
        with warnings.catch_warnings():
            # transformers 5.23 renamed it; older ones that we support lack the new name.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprec")
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    set_training(model)
    return model
