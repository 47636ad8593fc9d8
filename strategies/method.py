"""What a federated LoRA method is: allocation, schedule, merge and start, declared in one value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from rankfit.adapters.adapter import Adapter
from rankfit.adapters.merge import Merge
from rankfit.adapters.names import Moves
from rankfit.adapters.rates import Rates
from rankfit.configs.settings import ConfigError, Form, RunSettings, split_list
from rankfit.estimator.plan import Extra
from rankfit.strategies.allocation import Allocation
from rankfit.strategies.start import Leading, Start


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
        Who trains which rank of which module.
    schedule : Schedule
        Which factors move in which round.
    merge : MergeFactory
        How updates become the next global adapter.
    start : Start
        What each client is given: by default the first directions of the global adapter.
    extras : tuple[Extra, ...]
        What a client does beside plain training.
    row_norm : float or None
        Norm that every row of A has when a round begins; B carries the strength of a direction
        (None = the split that the merge gave).
    rates : Rates
        How fast factors and head learn, by Adam.
    form : {"lora", "kronecker"}
        The form of adapter that it merges; ``lora.form`` must be that.
    parts : Mapping[str, Callable[[Method], Method]]
        Parts that ``method.without`` can switch off, each with the method as it is without it.
    """

    name: str
    summary: str
    source: str
    allocate: Allocation
    schedule: Schedule
    merge: MergeFactory
    start: Start = field(default_factory=Leading)
    extras: tuple[Extra, ...] = ()
    row_norm: float | None = None
    rates: Rates = Rates()
    form: Form = "lora"
    parts: Mapping[str, "Callable[[Method], Method]"] = field(default_factory=dict)

    def split(self, adapter: Adapter) -> Adapter:
        """The global adapter as a round begins with it: the same products, in this method's split.

        The products decide what a model computes, the split how fast each factor learns.
        """
        return adapter if self.row_norm is None else adapter.with_row_norm(self.row_norm)


def configured(method: Method, settings: RunSettings) -> Method:
    """The method as the settings want it: parts switched off, the head's moments; and checked.

    Raises
    ------
    ConfigError
        For a part that the method does not have, or a setting that it cannot work with.
    """
    for part in split_list(settings.method.without):
        if part not in method.parts:
            has = ", ".join(method.parts) or "none"
            raise ConfigError(
                f"method.without: {method.name} has no part {part!r} that can be switched off "
                f"(it has: {has})"
            )
        method = method.parts[part](method)
    if (moment := settings.train.head_moment) != "method":
        rates = replace(method.rates, whole_head=moment == "tensor")
        method = replace(method, rates=rates)
    method.start.check(method.name, settings)
    if method.form != settings.lora.form:
        raise ConfigError(
            f"method.name {method.name} is for lora.form {method.form!r}, not "
            f"{settings.lora.form!r} (the preset lokr sets both)"
        )
    return method
