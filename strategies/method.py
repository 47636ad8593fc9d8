"""What a federated LoRA method is: allocation, schedule and merge, declared in one value.

The run loop knows no method by name; it asks the declaration. A new method is one file in
``strategies/catalogue`` with a ``METHOD``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rankfit.adapters.merge import Merge
from rankfit.adapters.names import Moves
from rankfit.adapters.state import Adapter

#: Largest rank that each client can train → rank that each is given.
Allocation = Callable[[Mapping[str, int]], Mapping[str, int]]
#: Round (from 1) → factors that move in it.
Schedule = Callable[[int], Moves]
#: Global adapter of the round and a seed → empty merge.
MergeFactory = Callable[[Adapter, int], Merge]


@dataclass(frozen=True)
class Method:
    """A federated LoRA method.

    Attributes
    ----------
    name, summary, source : str
        Name in the catalogue, one line, and the paper.
    allocate : Allocation
        Who trains which rank.
    schedule : Schedule
        Which factors move in which round.
    phases : tuple[Moves, ...]
        All values that the schedule can take; a plan must fit each of them.
    merge : MergeFactory
        How updates become the next global adapter. Every client starts from the first ``rank``
        directions of the global adapter.
    """

    name: str
    summary: str
    source: str
    allocate: Allocation
    schedule: Schedule
    phases: tuple[Moves, ...]
    merge: MergeFactory


def own_rank(largest: Mapping[str, int]) -> Mapping[str, int]:
    """Give each client the largest rank that it can train."""
    return dict(largest)


def one_rank(largest: Mapping[str, int]) -> Mapping[str, int]:
    """Give every client the rank of the weakest: averaging of factors needs one rank."""
    weakest = min(largest.values(), default=0)
    return dict.fromkeys(largest, weakest)


def both(server_round: int) -> Moves:
    """Train both factors in every round."""
    return "both"


def b_then_a(server_round: int) -> Moves:
    """Train B in odd rounds, A in even ones: B starts at zero, so A has no gradient before it."""
    return "b" if server_round % 2 == 1 else "a"
