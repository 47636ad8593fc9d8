"""Weighted mean of the products, then its best rank-R approximation."""

from rankfit.adapters.merge import MeanProduct
from rankfit.strategies.method import Method, both, own_rank

METHOD = Method(
    name="flexlora",
    summary="Weighted mean of the products, then its best rank-R approximation.",
    source="FlexLoRA (arXiv:2402.11505)",
    allocate=own_rank,
    schedule=both,
    phases=("both",),
    merge=MeanProduct,
)
