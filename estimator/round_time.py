"""What a round takes: bytes over a link and FLOPs of training, and the ranks that fit the time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankfit.adapters.names import Trainable
from rankfit.adapters.wire import HEAD_BYTES, SCALE_BYTES, WIRE_BYTES
from rankfit.estimator.depth import depth_of, shallow
from rankfit.estimator.meta_kernels import kernels
from rankfit.estimator.recording import Recorder
from rankfit.estimator.step import PASSES, STEPS, build, empty_batch, run_steps
from rankfit.estimator.step_spec import StepSpec
from rankfit.tasks.targets import weight_shape


def link_bytes(seconds: float, mbps: float) -> float:
    """Bytes that a link of ``mbps`` (10⁶ bits per second) carries in ``seconds``."""
    return seconds * mbps * 1e6 / 8


def rank_bound(
    seconds: float, mbps: float, bytes_per_rank: int, *, fixed_bytes: int = 0
) -> int | None:
    """Largest rank that travels in time: ⌊(seconds · Mbps · 10⁶/8 − fixed) / bytes per rank⌋.

    HRALoRA (CCGrid 2026), with a fixed cost beside the factors. None = no bound, where the time
    (0 = unlimited) or the link (0 = not known) sets none. 0 = not even the fixed part.

    Raises
    ------
    ValueError
        For negative figures, or bytes per rank that are not above 0.
    """
    if seconds < 0 or mbps < 0 or fixed_bytes < 0:
        raise ValueError(
            f"got {seconds} s, {mbps} Mbps and {fixed_bytes} fixed bytes; expected 0 or more"
        )
    if bytes_per_rank <= 0:
        raise ValueError(f"bytes per unit of rank are {bytes_per_rank}; expected more than 0")
    if seconds == 0 or mbps == 0:
        return None
    return max(0, math.floor((link_bytes(seconds, mbps) - fixed_bytes) / bytes_per_rank))


@dataclass(frozen=True)
class Payload:
    """What travels: the factors' sizes per unit of rank, and the head.

    Attributes
    ----------
    shapes : Mapping[str, tuple[int, int]]
        (outputs d, inputs k) of each adapted module: A is (rank, k), B is (d, rank).
    head_values : int
        Numbers in the heads that are trained; 0 = head frozen.
    wire_dtype : str
        Number type on the wire.
    """

    shapes: Mapping[str, tuple[int, int]]
    head_values: int = 0
    wire_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.wire_dtype not in WIRE_BYTES:
            raise ValueError(
                f"unknown wire type {self.wire_dtype!r}; set wire.dtype to one of "
                f"{', '.join(WIRE_BYTES)}"
            )

    @classmethod
    def of(
        cls, model: nn.Module, targets: Sequence[str], heads: Sequence[str], wire_dtype: str
    ) -> Self:
        """Read the shapes off a base model, with or without weights."""
        shapes = {name: weight_shape(model.get_submodule(name)) for name in targets}
        values = sum(p.numel() for name in heads for p in model.get_submodule(name).parameters())
        return cls(shapes, values, wire_dtype)

    @property
    def head_bytes(self) -> int:
        """Bytes of the trained head, whatever the rank."""
        return self.head_values * HEAD_BYTES[self.wire_dtype]

    def bytes_per_rank(self, trainable: Trainable = "both") -> int:
        """Bytes of the factors that move, for one unit of rank in every module."""
        return sum(self.direction_bytes(module, trainable) for module in self.shapes)

    def direction_bytes(self, module: str, trainable: Trainable = "both") -> int:
        """Bytes of one unit of rank of a module, in the factors that move."""
        d, k = self.shapes[module]
        lengths = {"both": (d, k), "b": (d,), "a": (k,)}[trainable]
        number, scale = WIRE_BYTES[self.wire_dtype], SCALE_BYTES[self.wire_dtype]
        return sum(length * number + scale for length in lengths)

    def upload_bound(
        self, seconds: float, mbps: float, phases: Sequence[Trainable] = ("both",)
    ) -> int | None:
        """Largest uniform rank that comes back in time in every phase; None = no bound."""
        per_rank = max(self.bytes_per_rank(trainable) for trainable in phases)
        return rank_bound(seconds, mbps, per_rank, fixed_bytes=self.head_bytes)

    def download_bound(self, seconds: float, mbps: float) -> int | None:
        """Largest uniform rank that goes out in time, both factors whatever moves.

        With a remainder the client gets the whole global rank, which this bound must then reach.
        """
        return rank_bound(seconds, mbps, self.bytes_per_rank(), fixed_bytes=self.head_bytes)


#: Depths at which models of equal layers are counted.
DEPTHS = (2, 3)


@dataclass(frozen=True)
class Work:
    """FLOPs of a training step for one sample.

    Attributes
    ----------
    base : float
        At rank 0.
    per_rank : float
        For one unit of rank in every module.
    """

    base: float
    per_rank: float

    def flops(self, rank: float) -> float:
        """FLOPs for one sample at a rank."""
        return self.base + rank * self.per_rank

    @classmethod
    def most(cls, works: Iterable[Self]) -> Self:
        """What holds for each of several phases."""
        listed = list(works)
        return cls(max(w.base for w in listed), max(w.per_rank for w in listed))


@dataclass(frozen=True)
class Throughput:
    """What a client's rounds were measured to take.

    Attributes
    ----------
    flops_per_second : float
        FLOPs of its plan over its training time, all else that this time holds included.
    examples : int
        Samples that it trains on in a round, repetitions included.
    """

    flops_per_second: float
    examples: int

    def __post_init__(self) -> None:
        if not (self.flops_per_second > 0 and self.examples > 0):
            raise ValueError(
                f"a throughput of {self.flops_per_second} FLOP/s over {self.examples} samples; "
                "expected figures above 0"
            )

    def seconds(self, flops: float) -> float:
        """Training time of a round whose samples take so many FLOPs each."""
        return self.examples * flops / self.flops_per_second

    def bound(self, work: Work, seconds: float) -> int | None:
        """Largest rank that is trained in time; None = no bound (0 s), 0 = not even the base."""
        if seconds == 0 or work.per_rank <= 0:
            return None
        left = seconds * self.flops_per_second / self.examples - work.base
        return max(0, math.floor(left / work.per_rank))


def work_of(spec: StepSpec) -> Work:
    """Count the FLOPs of a step.

    Raises
    ------
    TraceError, ModelError
        As :func:`~rankfit.estimator.recording.record`.
    """
    # FLOPs are alike on all devices; the kernels of a GPU are those that the counter knows.
    spec = replace(spec, accelerator="cuda", family="8.0", quantization="none", autocast="none")
    spec = replace(spec, micro_batch=2, accumulates=False, remainder=False)
    one, two = (_flops(spec, rank) for rank in (1, 2))
    return Work(one - (two - one), two - one)


def even_rank(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> float:
    """One rank in every module that is as much work as these: weighted by outputs + inputs."""
    whole = sum(d + k for d, k in shapes.values())
    return sum(rank * sum(shapes[module]) for module, rank in ranks.items()) / whole


def _flops(spec: StepSpec, rank: int) -> float:
    depth = depth_of(spec)
    if depth <= DEPTHS[-1]:
        return _count(spec, rank)
    low, high = (_count(shallow(spec, layers), rank) for layers in DEPTHS)
    return low + (depth - DEPTHS[0]) * (high - low)


def _count(spec: StepSpec, rank: int) -> float:
    model = build(spec, dict.fromkeys(spec.targets, rank))
    counter = FlopCounterMode(display=False)
    with kernels(spec.accelerator, spec.family), Recorder(spec), counter:
        run_steps(spec, model, lambda: empty_batch(spec))
    return counter.get_total_flops() / (STEPS * PASSES[spec.accumulates] * spec.micro_batch)
