"""Everybody trains at the weakest client's budget; plain averages."""

from rankfit.adapters.merge import AverageFactors
from rankfit.strategies.allocation import OneRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="straggler",
    summary="Everybody trains at the weakest client's budget; plain averages.",
    source="baseline of HRALoRA (CCGrid 2026)",
    allocate=OneRank(),
    schedule=both,
    merge=AverageFactors,
)
