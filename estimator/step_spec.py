"""The step spec: all that decides the memory of one training step."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import get_args

import torch

from rankfit.adapters.names import Trainable
from rankfit.configs.learning import Autocast, Optimizer, Precision, Quantization
from rankfit.estimator.device_report import Accelerator
from rankfit.tasks.base_model import Kind
from rankfit.tasks.task import TensorSpec

#: Bytes of one number.
DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "bool": 1,
}


def bytes_of(dtype: str) -> int:
    """Bytes of one number of a type.

    Raises
    ------
    ValueError
        For a type that is not known.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown number type {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class InputSpec:
    """One input of the model: its name, its shape for one sample, its number type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        bytes_of(self.dtype)
        if any(size <= 0 for size in self.shape):
            raise ValueError(f"input {self.name!r} has shape {self.shape}; expected sizes above 0")


@dataclass(frozen=True)
class StepSpec:
    """One training step, hashable; two equal specs take the same memory at equal ranks.

    Attributes
    ----------
    config : str
        Model config as canonical JSON (:func:`canonical`).
    kind : str
        Task kind.
    accelerator : {"cuda", "cpu"}
        Whose kernels are traced.
    targets, heads : tuple of str
        Adapted modules, and modules trained in full beside them, by their names in the base model.
    inputs : tuple of InputSpec
        Batch without its first dimension, labels included.
    micro_batch : int
        Samples per forward pass.
    family : str
        Of a GPU's attention kernels; "" on a CPU. See
        :func:`~rankfit.estimator.meta_kernels.kernel_family`.
    accumulates : bool
        More than one forward pass per optimizer step: gradients outlive a pass.
    dropout : float
        LoRA dropout.
    trainable : {"both", "a", "b"}
        Factors that are trained.
    remainder : bool
        A frozen second adapter beside the trained one.
    padded : bool
        Text batches hold padding, so that attention gets a mask.
    momentum : float
        Of ``sgd``.
    clips : bool
        Gradients are clipped by their norm.
    whole_head : bool
        AdamW has one second moment for each tensor of a head.
    """

    config: str
    kind: Kind
    accelerator: Accelerator
    targets: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    micro_batch: int
    family: str = ""
    heads: tuple[str, ...] = ()
    attention: str = "sdpa"
    precision: Precision = "fp32"
    quantization: Quantization = "none"
    autocast: Autocast = "none"
    optimizer: Optimizer = "adamw"
    momentum: float = 0.0
    checkpointing: bool = False
    accumulates: bool = False
    dropout: float = 0.0
    trainable: Trainable = "both"
    remainder: bool = False
    padded: bool = True
    clips: bool = False
    whole_head: bool = False

    def __post_init__(self) -> None:
        choices = {
            "kind": (self.kind, get_args(Kind)),
            "accelerator": (self.accelerator, ("cuda", "cpu")),
            "attention": (self.attention, ("sdpa", "eager")),
            "precision": (self.precision, get_args(Precision)),
            "quantization": (self.quantization, get_args(Quantization)),
            "autocast": (self.autocast, get_args(Autocast)),
            "optimizer": (self.optimizer, get_args(Optimizer)),
            "trainable": (self.trainable, ("both", "a", "b")),
        }
        for field, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{field} is {value!r}; expected one of {', '.join(allowed)}")
        if not self.targets:
            raise ValueError(
                "no module to adapt: the targets match nothing in this model; set lora.targets to "
                "names of its linear layers, or to all-linear"
            )
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; expected at least 1 sample")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")

    @property
    def key(self) -> str:
        """Cache key, the same in every process and on every machine."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def canonical(config: Mapping[str, object]) -> str:
    """Model config (``config.to_dict()``) as JSON that does not depend on order or version."""
    kept = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    return json.dumps(kept, sort_keys=True, default=str)


def inputs_of(
    batch: Mapping[str, TensorSpec] | Mapping[str, torch.Tensor],
) -> tuple[InputSpec, ...]:
    """Shapes of one sample from a task's ``example_batch``, or from a real batch."""
    return tuple(
        InputSpec(name, tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in batch.items()
    )
