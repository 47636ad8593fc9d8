"""How long a round takes: the work of a training step in FLOPs, and the throughput of a device."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from torch.utils.flop_counter import FlopCounterMode

from rankfit.estimator.depth import depth_of, shallow
from rankfit.estimator.meta_kernels import kernels
from rankfit.estimator.recording import Recorder
from rankfit.estimator.step import PASSES, STEPS, build, empty_batch, run_steps
from rankfit.estimator.step_spec import StepSpec

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
class Pace:
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
                f"a pace of {self.flops_per_second} FLOP/s over {self.examples} samples; expected "
                "figures above 0"
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
    spec = replace(spec, micro_batch=2, accumulates=False, tail=False)
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
