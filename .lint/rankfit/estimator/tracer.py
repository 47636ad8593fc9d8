"""The tracer: from a step spec to its trace, in about a second, without weights and without a GPU.

Traces are kept by step spec; one pair of recordings serves every micro-batch, and models of equal
layers are recorded at two small depths only (:mod:`rankfit.estimator.depth`).
"""

from dataclasses import replace

from rankfit.estimator.depth import solve_deep
from rankfit.estimator.record import collector_paused
from rankfit.estimator.solve import StepFamily, TraceError, solve
from rankfit.estimator.spec import StepSpec
from rankfit.estimator.store import TraceStore
from rankfit.estimator.trace import Trace

__all__ = ["StepFamily", "TraceCache", "TraceError", "solve", "trace"]

#: Micro-batches of the two recordings. A micro-batch of 1 is recorded for itself: with a dimension
#: of 1, tensors are contiguous that otherwise are copied.
BATCHES = (2, 3)


class TraceCache:
    """Traces by step spec: what costs a second once costs nothing for the next client.

    Parameters
    ----------
    store : TraceStore, optional
        Keeps them on disk too, for the next process.
    """

    def __init__(self, store: TraceStore | None = None) -> None:
        self._store = store
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
            family = self._linear(spec) if spec.micro_batch > 1 else None
            if family is None:
                family = self._family(spec, (spec.micro_batch, spec.micro_batch))
            self._traces[spec.key] = family.at(spec.micro_batch)
        return self._traces[spec.key]

    def _linear(self, spec: StepSpec) -> StepFamily | None:
        """Return the step at all micro-batches; None where bytes are not linear in it."""
        key = replace(spec, micro_batch=BATCHES[0]).key
        if key not in self._families:
            try:
                self._families[key] = self._family(replace(spec, micro_batch=BATCHES[0]), BATCHES)
            except TraceError:
                self._families[key] = None
        return self._families[key]

    def _family(self, spec: StepSpec, batches: tuple[int, int]) -> StepFamily:
        name = f"{spec.key}-{batches[0]}-{batches[1]}"
        if self._store is not None:
            kept = self._store.read(name, spec)
            if kept is not None:
                return kept
        with collector_paused():  # a tenth of the time
            family = solve_deep(spec, batches)
        if self._store is not None:
            self._store.write(name, family)
        return family


def trace(spec: StepSpec) -> Trace:
    """Trace one step at its own micro-batch alone, at its full depth.

    Raises
    ------
    TraceError
        If a storage is not proportional to one rank, or the events differ between ranks.
    ModelError
        If the model cannot be built or adapted.
    """
    return solve(spec, (spec.micro_batch, spec.micro_batch)).at(spec.micro_batch)
