"""Schedules: which factors move in which round (counted from 1)."""

from collections.abc import Callable
from dataclasses import dataclass

from rankfit.adapters.names import Moves
from rankfit.configs.settings import RunSettings


@dataclass(frozen=True)
class Stage:
    """What holds in one round.

    Attributes
    ----------
    moves : {"both", "a", "b"}
        Factors that are trained and returned in this round.
    phases : tuple of the same
        What moves in the rounds of this stage of the run: a plan fits each of them, so that ranks
        do not jump from round to round.
    """

    moves: Moves
    phases: tuple[Moves, ...]


#: (round, settings) → stage.
Schedule = Callable[[int, RunSettings], Stage]


def both(server_round: int, settings: RunSettings) -> Stage:
    """Train both factors in every round."""
    return Stage("both", ("both",))


def only_b(server_round: int, settings: RunSettings) -> Stage:
    """Train B; A stays at its shared random start (FFA-LoRA)."""
    return Stage("b", ("b",))


def b_then_a(server_round: int, settings: RunSettings) -> Stage:
    """Train B in odd rounds, A in even ones: B starts at zero, so A has no gradient before it."""
    return Stage("b" if server_round % 2 == 1 else "a", ("b", "a"))


@dataclass(frozen=True)
class WarmUp:
    """Both factors for ``method.warm-up-rounds`` rounds, then another schedule from its start."""

    then: Schedule

    def __call__(self, server_round: int, settings: RunSettings) -> Stage:
        """Stage of a round."""
        rounds = settings.method.warm_up_rounds
        if server_round <= rounds:
            return both(server_round, settings)
        return self.then(server_round - rounds, settings)
