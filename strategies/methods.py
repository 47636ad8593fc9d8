"""What a federated LoRA method is, and the catalogue of all methods, each declared in one value."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from rankfit.adapters.adapter import Adapter
from rankfit.adapters.merge import AverageFactors, Merge, PaddedChange, ZeroPadded
from rankfit.adapters.names import Rates, Trainable
from rankfit.adapters.product_merges import (
    AverageAndResidual,
    DampedChange,
    MeanChange,
    MeanProduct,
    OwnersMean,
    OwnersProduct,
    Refactored,
    Stacked,
)
from rankfit.configs.settings import ConfigError, Form, RunSettings, split_list
from rankfit.estimator.plan import Extra
from rankfit.strategies.allocation import (
    Allocation,
    FisherShares,
    LayersByFisher,
    LayersByPattern,
    LayersDrawnByPattern,
    OneRank,
    OnlyFullRank,
    OwnRank,
    TopLayersRising,
)
from rankfit.strategies.start import Drawn, Leading, LeadingOnFolded, LeadingWithRemainder, Start


@dataclass(frozen=True)
class Stage:
    """What holds in one round.

    Attributes
    ----------
    trainable : {"both", "a", "b"}
        Factors that are trained and returned in this round.
    phases : tuple of the same
        What is trained in the rounds of this stage: a plan fits each of them, so that ranks do
        not jump from round to round.
    """

    trainable: Trainable
    phases: tuple[Trainable, ...]


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


def _without(**changes: float | bool) -> Callable[[Method], Method]:
    return lambda method: replace(method, rates=replace(method.rates, **changes))  # type: ignore[arg-type]


# Why rows have one norm, turns of strong ones are damped, rates fall with the rank and the width,
# and a head has one second moment: docs/methods.md.
RANKFIT = Method(
    name="rankfit",
    summary="Product-space changes, merged exactly; clients see what they cannot train.",
    source="RankFit (this project); docs/methods.md",
    allocate=OwnRank(),
    schedule=both,
    merge=DampedChange,
    start=LeadingWithRemainder(),
    row_norm=1.0,
    rates=Rates(rank_power=0.25, row_step=6.0, whole_head=True),
    parts={
        "remainder": lambda method: replace(method, start=Leading()),
        "unit-rows": lambda method: replace(method, row_norm=None),
        "damping": lambda method: replace(method, merge=MeanChange),
        "rank-rates": _without(rank_power=0.0),
        "slow-rows": _without(row_step=0.0),
        "whole-head": _without(whole_head=False),
    },
)

# The warm-up is left out by method.warm-up-rounds=0.
HRALORA = Method(
    name="hralora",
    summary="Layers and ranks by Fisher score, warm-up, one factor a round, re-factorised.",
    source="HRALoRA (CCGrid 2026)",
    allocate=FisherShares(),
    schedule=WarmUp(b_then_a),
    merge=partial(Refactored, inner=OwnersMean),
    parts={
        "fisher": lambda method: replace(method, allocate=OwnRank()),
        "alternation": lambda method: replace(method, schedule=both),
        "refactorisation": lambda method: replace(method, merge=OwnersMean),
    },
)

FSLORA = Method(
    name="fslora",
    summary="Each client trains a random sketch of the global directions.",
    source="FSLoRA (arXiv:2501.19389)",
    allocate=OwnRank(),
    schedule=both,
    merge=PaddedChange,
    start=Drawn(),
)

HETLORA = Method(
    name="hetlora",
    summary="Zero-padded factors weighted by the norm of the product; self-pruning.",
    source="HetLoRA (arXiv:2401.06432)",
    allocate=OwnRank(),
    schedule=both,
    merge=ZeroPadded,
    extras=("prune",),
    parts={"self-pruning": lambda method: replace(method, extras=())},
)

FLEXLORA = Method(
    name="flexlora",
    summary="Weighted mean of the products, then its best rank-R approximation.",
    source="FlexLoRA (arXiv:2402.11505), HLoRA",
    allocate=OwnRank(),
    schedule=both,
    merge=MeanProduct,
)

FEDIT = Method(
    name="fedit",
    summary="Plain averages of A and of B at one rank: the weakest client's.",
    source="FedIT (arXiv:2305.05644)",
    allocate=OneRank(),
    schedule=both,
    merge=AverageFactors,
)

# The same in every part: HRALoRA runs it beside FedIT as a baseline of its own.
STRAGGLER = replace(
    FEDIT,
    name="straggler",
    summary="Everybody trains at the weakest client's budget; plain averages.",
    source="baseline of HRALoRA (CCGrid 2026)",
)

EXCLUSIVE = Method(
    name="exclusive",
    summary="Only clients that can afford the global rank take part; plain averages.",
    source="baseline of HRALoRA (CCGrid 2026)",
    allocate=OnlyFullRank(),
    schedule=both,
    merge=AverageFactors,
)

FFA_LORA = Method(
    name="ffa-lora",
    summary="B moves, A stays at a shared random start; one rank, exact.",
    source="FFA-LoRA (arXiv:2403.12313)",
    allocate=OneRank(),
    schedule=only_b,
    merge=AverageFactors,
)

ROLORA = Method(
    name="rolora",
    summary="B on one round, A on the next; one rank, exact.",
    source="RoLoRA (arXiv:2409.02346)",
    allocate=OneRank(),
    schedule=b_then_a,
    merge=AverageFactors,
)

ALTERNATING = Method(
    name="alternating",
    summary="One factor a round at mixed ranks; padded weighted changes, exact.",
    source="RoLoRA (arXiv:2409.02346) at mixed ranks, as in HRALoRA (CCGrid 2026)",
    allocate=OwnRank(),
    schedule=b_then_a,
    merge=PaddedChange,
)

LEGEND = Method(
    name="legend",
    summary="Layers from the top down, rank rising with depth; averaged over owners.",
    source="LEGEND (arXiv:2412.20004)",
    allocate=TopLayersRising(),
    schedule=both,
    merge=OwnersMean,
)

FED_HELLO_GD = Method(
    name="fed-hello-gd",
    summary="Whole layers by a fixed pattern (method.pattern); averaged over owners.",
    source="Fed-HeLLo GD-HLA (arXiv:2506.12213)",
    allocate=LayersByPattern(),
    schedule=both,
    merge=OwnersMean,
)

FED_HELLO_RGD = Method(
    name="fed-hello-rgd",
    summary="Whole layers drawn with a pattern as the prior; averaged over owners.",
    source="Fed-HeLLo RGD-HLA (arXiv:2506.12213)",
    allocate=LayersDrawnByPattern(),
    schedule=both,
    merge=OwnersMean,
)

FED_HELLO_FIM = Method(
    name="fed-hello-fim",
    summary="Whole layers drawn by Fisher score; averaged over owners.",
    source="Fed-HeLLo FIM-HLA (arXiv:2506.12213)",
    allocate=LayersByFisher(),
    schedule=both,
    merge=OwnersMean,
)

RBLA = Method(
    name="rbla",
    summary="Each direction averaged over the clients that trained it.",
    source="RBLA (arXiv:2408.08699), FediLoRA, HAFLQ",
    allocate=OwnRank(),
    schedule=both,
    merge=OwnersMean,
)

RAFLORA = Method(
    name="raflora",
    summary="Products by direction, each weighted over its owners; then the best rank R.",
    source="raFLoRA",
    allocate=OwnRank(),
    schedule=both,
    merge=OwnersProduct,
)

FEDEX_LORA = Method(
    name="fedex-lora",
    summary="Plain averages; what they miss of the mean is folded into the base.",
    source="FedEx-LoRA (arXiv:2410.09432)",
    allocate=OneRank(),
    schedule=both,
    merge=AverageAndResidual,
    start=LeadingOnFolded(),
)

FLORA = Method(
    name="flora",
    summary="All factors stacked, exact, and folded into the base each round.",
    source="FLoRA (arXiv:2409.05976)",
    allocate=OwnRank(),
    schedule=both,
    merge=Stacked,
    start=LeadingOnFolded(),
)

LOKR = Method(
    name="lokr",
    summary="Kronecker factors W₁ ⊗ B·A, averaged tensor by tensor; one rank, the weakest's.",
    source="LoKr (arXiv:2309.14859), as HRALoRA's baseline",
    allocate=OneRank(),
    schedule=both,
    merge=AverageFactors,
    form="kronecker",
)

#: Every method of the catalogue by its name.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        RANKFIT,
        HRALORA,
        FSLORA,
        HETLORA,
        FLEXLORA,
        FEDIT,
        STRAGGLER,
        EXCLUSIVE,
        FFA_LORA,
        ROLORA,
        ALTERNATING,
        LEGEND,
        FED_HELLO_GD,
        FED_HELLO_RGD,
        FED_HELLO_FIM,
        RBLA,
        RAFLORA,
        FEDEX_LORA,
        FLORA,
        LOKR,
    )
}


def methods() -> dict[str, Method]:
    """All methods by name."""
    return METHODS


def find(name: str) -> Method:
    """Look a method up.

    Raises
    ------
    ConfigError
        If there is none of that name; the message lists all.
    """
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown method {name!r}{hint} (method.name: {', '.join(sorted(known))})"
        )
    return known[name]
