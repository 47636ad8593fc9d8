"""Zero-padded factors weighted by the norm of the product; no self-pruning yet."""

from rankfit.adapters.merge import ZeroPadded
from rankfit.strategies.method import Method, both, own_rank

METHOD = Method(
    name="hetlora",
    summary="Zero-padded factors weighted by the norm of the product; no self-pruning yet.",
    source="HetLoRA (arXiv:2401.06432)",
    allocate=own_rank,
    schedule=both,
    phases=("both",),
    merge=ZeroPadded,
)
