"""Weighted mean of the products, then its best rank-R approximation."""

from rankfit.adapters.mean_product import MeanProduct
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="flexlora",
    summary="Weighted mean of the products, then its best rank-R approximation.",
    source="FlexLoRA (arXiv:2402.11505), HLoRA",
    allocate=OwnRank(),
    schedule=both,
    merge=MeanProduct,
)
