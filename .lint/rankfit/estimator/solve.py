"""From two recordings to one closed form: which variable decides the bytes of each storage.

Two recordings at distinct primes for every rank and for the micro-batch are matched event by event.
A storage whose bytes differ between them is proportional to one rank, to the micro-batch, or to
both, and no doubt is possible: the ratio of its bytes, in lowest terms, is a ratio of those primes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import gcd

import numpy as np
from numpy.typing import NDArray

from rankfit.estimator.record import WORKSPACE, Allocation, Recording, record
from rankfit.estimator.record import TraceError as TraceError
from rankfit.estimator.spec import StepSpec
from rankfit.estimator.step import Phase
from rankfit.estimator.trace import Array, Trace


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
    count = len(spec.targets) * (2 if spec.tail else 1)
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
    tail = dict(zip(spec.targets, values[len(spec.targets) :], strict=False))
    return record(spec, ranks, tail or None)


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
