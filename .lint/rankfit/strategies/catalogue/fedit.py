"""Plain averages of A and of B at one rank: the weakest client's."""

from rankfit.adapters.merge import AverageFactors
from rankfit.strategies.allocation import OneRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="fedit",
    summary="Plain averages of A and of B at one rank: the weakest client's.",
    source="FedIT (arXiv:2305.05644)",
    allocate=OneRank(),
    schedule=both,
    merge=AverageFactors,
)
