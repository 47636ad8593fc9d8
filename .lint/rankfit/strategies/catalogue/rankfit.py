"""Product-space changes merged exactly; clients see what they cannot train.

Why rows have one norm, turns of strong ones are damped, rates fall with the rank and the width, and
a head has one second moment: docs/methods.md.
"""

from collections.abc import Callable
from dataclasses import replace

from rankfit.adapters.mean_product import DampedChange, MeanChange
from rankfit.adapters.rates import Rates
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both
from rankfit.strategies.start import Leading, LeadingWithTail


def _without(**changes: float | bool) -> Callable[[Method], Method]:
    return lambda method: replace(method, rates=replace(method.rates, **changes))  # type: ignore[arg-type]


METHOD = Method(
    name="rankfit",
    summary="Product-space changes, merged exactly; clients see what they cannot train.",
    source="RankFit (this project); docs/methods.md",
    allocate=OwnRank(),
    schedule=both,
    merge=DampedChange,
    start=LeadingWithTail(),
    row_norm=1.0,
    rates=Rates(rank_power=0.25, row_step=6.0, whole_head=True),
    parts={
        "tail": lambda method: replace(method, start=Leading()),
        "unit-rows": lambda method: replace(method, row_norm=None),
        "damping": lambda method: replace(method, merge=MeanChange),
        "rank-rates": _without(rank_power=0.0),
        "slow-rows": _without(row_step=0.0),
        "whole-head": _without(whole_head=False),
    },
)
