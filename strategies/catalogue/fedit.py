"""Plain averages of A and of B at the weakest client's rank."""

from rankfit.adapters.merge import AverageFactors
from rankfit.strategies.method import Method, both, one_rank

METHOD = Method(
    name="fedit",
    summary="Plain averages of A and of B at the weakest client's rank.",
    source="FedIT (arXiv:2305.05644)",
    allocate=one_rank,
    schedule=both,
    phases=("both",),
    merge=AverageFactors,
)
