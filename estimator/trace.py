"""The trace: the memory of a training step as a closed form in every adapter's rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import gcd

import numpy as np
from numpy.typing import NDArray

from rankfit.estimator.calibration import Calibration
from rankfit.estimator.recording import WORKSPACE, Allocation, Recording, record
from rankfit.estimator.recording import TraceError as TraceError
from rankfit.estimator.step import Phase
from rankfit.estimator.step_spec import StepSpec

Ranks = int | Mapping[str, int]
Array = NDArray[np.int64]

NO_TERMS = Calibration()


@dataclass(frozen=True)
class Breakdown:
    """Where the peak goes, in bytes, in the accounting of HRALoRA (CCGrid 2026).

    Parameters, gradients and optimizer state at their full size; ``overhead`` = library workspaces
    and the temporaries of the optimizer's step; ``forward`` = the rest of the peak, which is what
    the forward and backward pass hold beyond those.
    """

    parameters: int
    forward: int
    gradients: int
    optimizer: int
    overhead: int

    @property
    def total(self) -> int:
        """Peak of live bytes."""
        return self.parameters + self.forward + self.gradients + self.optimizer + self.overhead


@dataclass(frozen=True, eq=False)
class Trace:
    """Allocation events of one training step, each in proportion to one variable.

    The variables are 1, the rank of each target, the remainder's rank of each, and the terms of the
    calibration (workspace, scratch).

    Attributes
    ----------
    column, amount : Array
        Variable of each allocation, and bytes per unit of it: (allocations,).
    events : Array
        Index of an allocation as it begins, −1 − index as it ends: (events,).
    loaded, last_step : int
        Events before the first step, and before the last call of the optimizer.
    trained, state : Array
        Allocations of trained parameters, and of the optimizer.
    """

    spec: StepSpec
    column: Array
    amount: Array
    events: Array
    loaded: int
    last_step: int
    trained: Array
    state: Array

    @property
    def modules(self) -> tuple[str, ...]:
        """Adapted modules, in the order of the variables."""
        return self.spec.targets

    @property
    def variables(self) -> int:
        """Number of variables."""
        return 1 + 2 * len(self.modules) + 2

    @cached_property
    def parameters(self) -> Array:
        """Bytes of all parameters and buffers: (variables,)."""
        return self.row(self.loaded - 1)

    @cached_property
    def gradients(self) -> Array:
        """Bytes of all gradients: (variables,)."""
        return self._total(self.trained)

    @cached_property
    def optimizer(self) -> Array:
        """Bytes of the optimizer's state: (variables,)."""
        return self._total(self.state)

    def sizes(self, point: Array) -> Array:
        """Bytes of each allocation where the variables have these values: (allocations,)."""
        return self.amount * point[self.column]

    def live(self, point: Array) -> Array:
        """Live bytes after each event: (events,)."""
        sizes = self.sizes(point)
        return np.cumsum(np.where(self.events >= 0, sizes[self._index], -sizes[self._index]))

    def row(self, event: int) -> Array:
        """Live bytes after one event as a linear form: (variables,)."""
        index = self._index[: event + 1]
        signed = np.where(self.events[: event + 1] >= 0, self.amount[index], -self.amount[index])
        row = np.zeros(self.variables, dtype=np.int64)
        np.add.at(row, self.column[index], signed)
        return row

    def peak_live(
        self,
        ranks: Ranks,
        *,
        remainder_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> int:
        """Peak of live bytes at these ranks (an int = the same for every module)."""
        return int(self.live(self.point(ranks, remainder_ranks, calibration)).max())

    def peak_row(
        self,
        ranks: Ranks,
        *,
        remainder_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> Array:
        """Linear form that peaks at these ranks, and is at most the peak at any: (variables,)."""
        return self.row(int(self.live(self.point(ranks, remainder_ranks, calibration)).argmax()))

    def prices(
        self,
        ranks: Ranks = 1,
        *,
        remainder_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> dict[str, int]:
        """Bytes per unit of rank of each module, at the peak that these ranks have."""
        row = self.peak_row(ranks, remainder_ranks=remainder_ranks, calibration=calibration)
        return dict(zip(self.modules, row[1 : 1 + len(self.modules)].tolist(), strict=True))

    def price(self, module: str, ranks: Ranks = 1) -> int:
        """Bytes per unit of rank of one module."""
        if module not in self.modules:
            raise ValueError(f"{module!r} is not adapted; adapted are {', '.join(self.modules)}")
        return self.prices(ranks)[module]

    def breakdown(
        self,
        ranks: Ranks,
        *,
        remainder_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> Breakdown:
        """Split the peak into its categories."""
        point = self.point(ranks, remainder_ranks, calibration)
        live = self.live(point)
        parameters, gradients, optimizer = (
            int(category @ point) for category in (self.parameters, self.gradients, self.optimizer)
        )
        workspaces = int(self.sizes(point)[self.column == self.variables - 2].sum())
        step = int(live[self.last_step :].max() - live[self.last_step - 1])
        overhead = workspaces + max(0, step)
        total = int(live.max())
        forward = total - parameters - gradients - optimizer - overhead
        return Breakdown(parameters, forward, gradients, optimizer, overhead)

    def uniform(self, calibration: Calibration = NO_TERMS) -> Array:
        """Live bytes as (bytes, per rank, per remainder rank), the same rank in every module.

        Only moments that can be the peak: (moments, 3).
        """
        count = len(self.modules)
        forms = np.zeros((len(self.events), 3), dtype=np.int64)
        base = np.zeros(self.variables, dtype=np.int64)
        base[0], base[-2:] = 1, (calibration.cublas_workspace, calibration.attention_scratch)
        for part, columns in enumerate(
            (None, slice(1, 1 + count), slice(1 + count, 1 + 2 * count))
        ):
            point = base
            if columns is not None:
                point = np.zeros_like(base)
                point[columns] = 1
            forms[:, part] = self.live(point)
        slopes, which = np.unique(forms[:, 1:], axis=0, return_inverse=True)
        best = np.full(len(slopes), np.iinfo(np.int64).min)
        np.maximum.at(best, which.ravel(), forms[:, 0])
        return np.column_stack([best, slopes])

    @cached_property
    def _index(self) -> Array:
        return np.where(self.events >= 0, self.events, -1 - self.events)

    def _total(self, allocations: Array) -> Array:
        row = np.zeros(self.variables, dtype=np.int64)
        np.add.at(row, self.column[allocations], self.amount[allocations])
        return row

    def point(self, ranks: Ranks, remainder_ranks: Ranks, calibration: Calibration) -> Array:
        """Values of the variables: (variables,).

        Raises
        ------
        ValueError
            For a rank below 1, or ranks of other modules than the spec's targets.
        """
        trained = self._vector(ranks, 1, "rank")
        remainder = self._vector(remainder_ranks, 0, "remainder rank")
        if not self.spec.remainder and any(remainder):
            raise ValueError("this step was traced without a remainder; set remainder=True")
        terms = (calibration.cublas_workspace, calibration.attention_scratch)
        return np.array([1, *trained, *remainder, *terms], dtype=np.int64)

    def _vector(self, ranks: Ranks, least: int, what: str) -> list[int]:
        named = dict.fromkeys(self.modules, ranks) if isinstance(ranks, int) else ranks
        if set(named) != set(self.modules):
            odd = sorted(set(named) ^ set(self.modules))
            raise ValueError(f"{what}s are given for other modules than were traced: {odd[:4]}")
        for module, value in named.items():
            if value < least:
                raise ValueError(
                    f"{what} of {module!r} is {value}; expected at least {least} (a module without "
                    "an adapter is left out of the spec's targets)"
                )
        return [int(named[module]) for module in self.modules]


@dataclass(frozen=True, eq=False)
class StepFamily:
    """One training step at every micro-batch that it was solved for.

    Attributes
    ----------
    operators : list of str
        Who asked for each allocation.
    column, amount : Array
        Variable of each allocation as in :class:`Trace`, bytes per unit of it: (allocations,).
    sampled : NDArray
        Whether that is for each sample of the micro-batch: (allocations,).
    events : Array
        As in :class:`Trace`: (events,).
    phases : list of str
        Phase of each event.
    trained, state : Array
        As in :class:`Trace`.
    """

    spec: StepSpec
    operators: list[str]
    column: Array
    amount: Array
    sampled: NDArray[np.bool_]
    events: Array
    phases: list[Phase]
    trained: Array
    state: Array

    def at(self, micro_batch: int) -> Trace:
        """Trace at a micro-batch."""
        phases = np.array(self.phases)
        steps = phases == "optimizer"
        starts = np.flatnonzero(steps & ~np.append(False, steps[:-1]))
        return Trace(
            spec=replace(self.spec, micro_batch=micro_batch),
            column=self.column,
            amount=self.amount * np.where(self.sampled, micro_batch, 1),
            events=self.events,
            loaded=int(np.flatnonzero(phases == "load")[-1]) + 1,
            last_step=int(starts[-1]),
            trained=self.trained,
            state=self.state,
        )


def solve(spec: StepSpec, batches: tuple[int, int]) -> StepFamily:
    """Record a step at two vectors of primes and solve each allocation.

    Parameters
    ----------
    batches : tuple of int
        Micro-batches of the two recordings: two primes below 5, or twice the same.

    Raises
    ------
    TraceError
        If a storage is not proportional to one rank, or the events differ between ranks.
    ModelError
        If the model cannot be built or adapted.
    """
    count = len(spec.targets) * (2 if spec.remainder else 1)
    primes = list(islice(_primes(), 2 * count))
    values = (primes[::2], primes[1::2])
    one, two = (
        _record_at(replace(spec, micro_batch=batch), ranks)
        for batch, ranks in zip(batches, values, strict=True)
    )
    if one.events != two.events or len(one.allocations) != len(two.allocations):
        raise TraceError(
            "the training step allocates in another order at other ranks, so its memory has no "
            "closed form; leave the modules that cause it out of lora.targets"
        )
    variables = _ratios(batches, values)
    workspace = 1 + 2 * len(spec.targets)
    solved = []
    for a, b in zip(one.allocations, two.allocations, strict=True):
        divisor = gcd(a.nbytes, b.nbytes) or 1
        ratio = (a.nbytes // divisor, b.nbytes // divisor) if a.nbytes != b.nbytes else (1, 1)
        if ratio not in variables:
            raise _not_linear(a, b)
        column, sampled = variables[ratio]
        if a.term:
            column = workspace if a.term == WORKSPACE else workspace + 1
        solved.append((column, a.nbytes // ratio[0], sampled))
    columns, amounts, per_sample = zip(*solved, strict=True)
    return StepFamily(
        spec=spec,
        operators=[allocation.operator for allocation in one.allocations],
        column=np.array(columns, dtype=np.int64),
        amount=np.array(amounts, dtype=np.int64),
        sampled=np.array(per_sample, dtype=np.bool_),
        events=np.array([i if begins else -1 - i for i, begins, _ in one.events], dtype=np.int64),
        phases=[phase for _, _, phase in one.events],
        trained=np.array(one.trained, dtype=np.int64),
        state=np.array(one.state, dtype=np.int64),
    )


def _ratios(
    batches: tuple[int, int], values: tuple[Sequence[int], Sequence[int]]
) -> dict[tuple[int, int], tuple[int, bool]]:
    """Ratio of bytes → column of the variable, and whether it is per sample."""
    ratios = {(1, 1): (0, False)}
    for column, (p, q) in enumerate(zip(*values, strict=True), start=1):
        ratios[p, q] = (column, False)
        if batches[0] != batches[1]:
            ratios[batches[0] * p, batches[1] * q] = (column, True)
    if batches[0] != batches[1]:
        ratios[batches] = (0, True)
    return ratios


def _record_at(spec: StepSpec, values: Sequence[int]) -> Recording:
    ranks = dict(zip(spec.targets, values, strict=False))
    remainder = dict(zip(spec.targets, values[len(spec.targets) :], strict=False))
    return record(spec, ranks, remainder or None)


def _primes() -> Iterator[int]:
    """Yield the primes from 5 on."""
    found: list[int] = [2, 3]
    candidate = 5
    while True:
        if all(candidate % prime for prime in found if prime * prime <= candidate):
            found.append(candidate)
            yield candidate
        candidate += 2


def _not_linear(a: Allocation, b: Allocation) -> TraceError:
    return TraceError(
        f"{a.operator} allocates {a.nbytes} bytes {a.shape} at some ranks and {b.nbytes} {b.shape} "
        "at others, which is not proportional to one adapter's rank; memory has no closed form here"
    )
