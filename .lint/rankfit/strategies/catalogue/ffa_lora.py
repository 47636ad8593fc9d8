"""B moves, A stays at a shared random start; one rank, exact."""

from rankfit.adapters.merge import AverageFactors
from rankfit.strategies.allocation import OneRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import only_b

METHOD = Method(
    name="ffa-lora",
    summary="B moves, A stays at a shared random start; one rank, exact.",
    source="FFA-LoRA (arXiv:2403.12313)",
    allocate=OneRank(),
    schedule=only_b,
    merge=AverageFactors,
)
