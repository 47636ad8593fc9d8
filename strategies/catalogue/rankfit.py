"""Product-space changes merged exactly; clients see what they cannot train.

Why rows have one norm, turns of strong ones are damped, and rates fall with the rank and the width:
docs/methods.md.
"""

from dataclasses import replace

from rankfit.adapters.mean_product import DampedChange, MeanChange
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both
from rankfit.strategies.start import Leading, LeadingWithTail

METHOD = Method(
    name="rankfit",
    summary="Product-space changes, merged exactly; clients see what they cannot train.",
    source="RankFit (this project); docs/methods.md",
    allocate=OwnRank(),
    schedule=both,
    merge=DampedChange,
    start=LeadingWithTail(),
    row_norm=1.0,
    rank_power=0.25,
    row_step=6.0,
    parts={
        "tail": lambda method: replace(method, start=Leading()),
        "unit-rows": lambda method: replace(method, row_norm=None),
        "damping": lambda method: replace(method, merge=MeanChange),
        "rank-rates": lambda method: replace(method, rank_power=0.0),
        "slow-rows": lambda method: replace(method, row_step=0.0),
    },
)
