"""Only clients that can afford the global rank take part; plain averages."""

from rankfit.adapters.merge import AverageFactors
from rankfit.strategies.allocation import OnlyFullRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="exclusive",
    summary="Only clients that can afford the global rank take part; plain averages.",
    source="baseline of HRALoRA (CCGrid 2026)",
    allocate=OnlyFullRank(),
    schedule=both,
    merge=AverageFactors,
)
