"""The tracer: from a step spec to its trace, in about a second, without weights and without a GPU.

Two recordings at distinct primes for every rank and for the micro-batch are matched event by event.
A storage whose bytes differ between them is proportional to one rank, to the micro-batch, or to
both, and no doubt is possible: the ratio of its bytes, in lowest terms, is a ratio of those primes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import gcd

import numpy as np

from rankfit.estimator.record import WORKSPACE, Allocation, Recording, record
from rankfit.estimator.spec import StepSpec
from rankfit.estimator.trace import Array, Trace

#: Micro-batches of the two recordings. A micro-batch of 1 is recorded for itself: with a dimension
#: of 1, tensors are contiguous that otherwise are copied.
BATCHES = (2, 3)


class TraceError(ValueError):
    """A model whose training step has no closed form in the ranks."""


@dataclass(frozen=True, eq=False)
class StepFamily:
    """One training step at every micro-batch that it was solved for.

    Attributes
    ----------
    per_step, per_sample : Array
        Bytes of each allocation that do not depend on the micro-batch, and for each sample of it:
        (allocations, variables), with the variables of :class:`Trace`.
    """

    spec: StepSpec
    recording: Recording
    per_step: Array
    per_sample: Array

    def at(self, micro_batch: int) -> Trace:
        """Trace at a micro-batch."""
        spec = replace(self.spec, micro_batch=micro_batch)
        return _assemble(spec, self.recording, self.per_step + micro_batch * self.per_sample)


class TraceCache:
    """Traces by step spec: what costs a second once costs nothing for the next client."""

    def __init__(self) -> None:
        self._traces: dict[str, Trace] = {}
        self._families: dict[str, StepFamily | None] = {}

    def __call__(self, spec: StepSpec) -> Trace:
        """Return the trace of a spec, made at the first call.

        Raises
        ------
        TraceError
            If the step has no closed form.
        ModelError
            If the model cannot be built or adapted.
        """
        if spec.key not in self._traces:
            family = self._family(spec) if spec.micro_batch > 1 else None
            self._traces[spec.key] = family.at(spec.micro_batch) if family else trace(spec)
        return self._traces[spec.key]

    def _family(self, spec: StepSpec) -> StepFamily | None:
        """Return the step at all micro-batches; None where bytes are not linear in it."""
        key = replace(spec, micro_batch=BATCHES[0]).key
        if key not in self._families:
            try:
                self._families[key] = solve(spec, BATCHES)
            except TraceError:
                self._families[key] = None
        return self._families[key]


def trace(spec: StepSpec) -> Trace:
    """Trace one step at its own micro-batch alone.

    Raises
    ------
    TraceError
        If a storage is not proportional to one rank, or the events differ between ranks.
    ModelError
        If the model cannot be built or adapted.
    """
    return solve(spec, (spec.micro_batch, spec.micro_batch)).at(spec.micro_batch)


def solve(spec: StepSpec, batches: tuple[int, int]) -> StepFamily:
    """Record a step at two vectors of primes and solve each allocation; see the module.

    Parameters
    ----------
    batches : tuple of int
        Micro-batches of the two recordings: two primes below 5, or twice the same.
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
    shape = (len(one.allocations), 1 + 2 * len(spec.targets) + 2)
    per_step, per_sample = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for index, (a, b) in enumerate(zip(one.allocations, two.allocations, strict=True)):
        divisor = gcd(a.nbytes, b.nbytes) or 1
        ratio = (a.nbytes // divisor, b.nbytes // divisor) if a.nbytes != b.nbytes else (1, 1)
        if ratio not in variables:
            raise _not_linear(a, b)
        column, sampled = variables[ratio]
        if a.term:
            column = -2 if a.term == WORKSPACE else -1
        amount = a.nbytes // ratio[0]
        (per_sample if sampled else per_step)[index, column] = amount
    return StepFamily(spec, one, per_step, per_sample)


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


def _assemble(spec: StepSpec, recording: Recording, sizes: Array) -> Trace:
    """Sum the events up to the moments that matter."""
    index = np.array([i for i, _, _ in recording.events], dtype=np.int64)
    begins = np.array([begin for _, begin, _ in recording.events])
    steps = np.array([phase == "optimizer" for _, _, phase in recording.events])
    load = np.array([phase == "load" for _, _, phase in recording.events])
    live = np.cumsum(np.where(begins[:, None], sizes[index], -sizes[index]), axis=0)
    tops = begins & ~np.append(begins[1:], False)  # an allocation that a release follows
    # The last optimizer step finds its state in place: what it takes beyond its start is temporary.
    starts = np.flatnonzero(steps & ~np.append(False, steps[:-1]))
    last = np.arange(len(index)) >= starts[-1]
    return Trace(
        spec=spec,
        sizes=sizes,
        events=np.where(begins, index, -1 - index),
        peaks=_undominated(live[tops]),
        step_peaks=_undominated(live[tops & steps & last] - live[starts[-1] - 1]),
        parameters=live[np.flatnonzero(load)[-1]],
        gradients=sizes[recording.trained].sum(axis=0),
        optimizer=sizes[recording.state].sum(axis=0, dtype=np.int64),
    )


def _undominated(rows: Array) -> Array:
    """Rows that no other row exceeds in every column: the others are never the maximum."""
    rows = np.unique(rows, axis=0)
    kept: list[Array] = []
    for row in rows[np.argsort(-rows.sum(axis=1), kind="stable")]:
        if not kept or not (np.array(kept) >= row).all(axis=1).any():
            kept.append(row)
    return np.array(kept, dtype=np.int64).reshape(-1, rows.shape[1])
