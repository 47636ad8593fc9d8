"""The trace: the memory of a training step as a function of every adapter's rank, in closed form.

Each storage is affine in the ranks, so live bytes after each event are too, and their peak is the
maximum of linear functions: exact for every vector of ranks, convex, evaluated in microseconds.
:mod:`rankfit.estimator.tracer` makes traces.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
    """Allocation events of one training step, each affine in the ranks.

    Attributes
    ----------
    sizes : Array
        Bytes of each allocation: (allocations, variables). The variables are 1, the rank of each
        target, the tail's rank of each target, and the terms of the calibration.
    events : Array
        Index of an allocation as it begins, −1 − index as it ends: (events,).
    peaks : Array
        Live bytes at the moments that can be the peak: (moments, variables).
    step_peaks : Array
        Bytes beyond those at its start that the optimizer's step takes: (moments, variables).
    parameters, gradients, optimizer : Array
        Bytes of each category: (variables,).
    """

    spec: StepSpec
    sizes: Array
    events: Array
    peaks: Array
    step_peaks: Array
    parameters: Array
    gradients: Array
    optimizer: Array

    @property
    def modules(self) -> tuple[str, ...]:
        """Adapted modules, in the order of the variables."""
        return self.spec.targets

    def peak_live(
        self,
        ranks: Ranks,
        *,
        tail_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> int:
        """Peak of live bytes at these ranks (an int = the same for every module)."""
        return int((self.peaks @ self.point(ranks, tail_ranks, calibration)).max())

    def prices(
        self,
        ranks: Ranks = 1,
        *,
        tail_ranks: Ranks = 0,
        calibration: Calibration = NO_TERMS,
    ) -> dict[str, int]:
        """Bytes per unit of rank of each module, at the peak that these ranks have."""
        moment = int((self.peaks @ self.point(ranks, tail_ranks, calibration)).argmax())
        slopes = self.peaks[moment, 1 : 1 + len(self.modules)]
        return dict(zip(self.modules, slopes.tolist(), strict=True))

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
        parameters, gradients, optimizer = (
            int(category @ point) for category in (self.parameters, self.gradients, self.optimizer)
        )
        workspaces = int(self._workspaces() @ point)
        overhead = workspaces + int((self.step_peaks @ point).max(initial=0))
        total = int((self.peaks @ point).max())
        forward = total - parameters - gradients - optimizer - overhead
        return Breakdown(parameters, forward, gradients, optimizer, overhead)

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

    def _workspaces(self) -> Array:
        column = np.zeros_like(self.parameters)
        column[-2] = self.sizes[:, -2].sum()
        return column
