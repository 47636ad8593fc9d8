"""The trace: the memory of a training step as a function of every adapter's rank, in closed form.

Each storage is proportional to one rank or to none, so live bytes after each event are linear in
the ranks, and their peak is the maximum of linear functions: exact for every vector of ranks,
convex, evaluated in a millisecond.
:mod:`rankfit.estimator.tracer` makes traces.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rankfit.estimator.calibration import Calibration
from rankfit.estimator.spec import StepSpec

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

    The variables are 1, the rank of each target, the tail's rank of each target, and the terms of
    the calibration (workspace, scratch).

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
        tail_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> int:
        """Peak of live bytes at these ranks (an int = the same for every module)."""
        return int(self.live(self.point(ranks, tail_ranks, calibration)).max())

    def peak_row(
        self,
        ranks: Ranks,
        *,
        tail_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> Array:
        """Linear form that peaks at these ranks, and is at most the peak at any: (variables,)."""
        return self.row(int(self.live(self.point(ranks, tail_ranks, calibration)).argmax()))

    def prices(
        self,
        ranks: Ranks = 1,
        *,
        tail_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> dict[str, int]:
        """Bytes per unit of rank of each module, at the peak that these ranks have."""
        row = self.peak_row(ranks, tail_ranks=tail_ranks, calibration=calibration)
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
        tail_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> Breakdown:
        """Split the peak into its categories."""
        point = self.point(ranks, tail_ranks, calibration)
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
        """Live bytes as (bytes, per rank, per tail rank), the same rank in every module.

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

    def point(self, ranks: Ranks, tail_ranks: Ranks, calibration: Calibration) -> Array:
        """Values of the variables: (variables,).

        Raises
        ------
        ValueError
            For a rank below 1, or ranks of other modules than the spec's targets.
        """
        trained = self._vector(ranks, 1, "rank")
        tail = self._vector(tail_ranks, 0, "tail rank")
        if not self.spec.tail and any(tail):
            raise ValueError("this step was traced without a tail; set tail=True in its spec")
        terms = (calibration.cublas_workspace, calibration.attention_scratch)
        return np.array([1, *trained, *tail, *terms], dtype=np.int64)

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
