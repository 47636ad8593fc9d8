"""The least memory under which each rank trains on a GPU, found once per step of the plan search.

Whether a rank survives under a cap takes a replay, and a scan over ranks takes one for each. So the
caps are searched once, rank by rank, and another device is a look-up and one replay of the answer.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rankfit.estimator.allocator import SMALL_SEGMENT

#: Segments are multiples of it, so two caps between the same multiples allow the same.
GRAIN = SMALL_SEGMENT

#: Rank and cap → whether it survives, and how far that answer holds: down to what was reserved, or
#: up to below the least total that was refused.
Attempt = Callable[[int, int], tuple[bool, int]]


class Thresholds:
    """Least surviving cap of the ranks from 1 on.

    The search for a rank begins at the cap of the rank before it, and the ranks always come in the
    same order, so that the answer does not depend on who asks. The allocator is not monotone: at
    some higher cap the rank may fail again, and at some lower one it may by chance survive.

    Parameters
    ----------
    attempt : Attempt
        Replays one rank under one cap.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._caps: list[int] = []

    def up_to(self, live: NDArray[np.int64]) -> NDArray[np.int64]:
        """Least cap of each rank, in bytes: (limit,).

        Parameters
        ----------
        live : NDArray
            Peak of live bytes at the ranks 1 … limit: no cap below it can do. (limit,)
        """
        for rank in range(len(self._caps) + 1, len(live) + 1):
            floor = -(-int(live[rank - 1]) // GRAIN) * GRAIN
            start = max(floor, self._caps[-1]) if self._caps else floor
            self._caps.append(self._search(rank, floor, start))
        return np.array(self._caps[: len(live)], dtype=np.int64)

    def _search(self, rank: int, floor: int, start: int) -> int:
        """Least cap that survives: in steps that double away from ``start``, then halving."""
        survived, bound = self._attempt(rank, start)
        step = GRAIN
        fails, survives = floor - GRAIN, bound
        if survived:
            while survives > floor:
                survived, bound = self._attempt(rank, max(floor, survives - step))
                if not survived:
                    fails = bound - GRAIN
                    break
                survives, step = bound, 2 * step
        else:
            while not survived:
                fails = bound - GRAIN
                survived, bound = self._attempt(rank, fails + step)
                step *= 2
            survives = bound
        while survives - fails > GRAIN:
            middle = fails + (survives - fails) // (2 * GRAIN) * GRAIN
            survived, bound = self._attempt(rank, middle)
            if survived:
                survives = bound
            else:
                fails = bound - GRAIN
        return survives
