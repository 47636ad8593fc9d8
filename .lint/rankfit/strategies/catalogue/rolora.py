"""B on one round, A on the next; one rank, exact."""

from rankfit.adapters.merge import AverageFactors
from rankfit.strategies.allocation import OneRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import b_then_a

METHOD = Method(
    name="rolora",
    summary="B on one round, A on the next; one rank, exact.",
    source="RoLoRA (arXiv:2409.02346)",
    allocate=OneRank(),
    schedule=b_then_a,
    merge=AverageFactors,
)
