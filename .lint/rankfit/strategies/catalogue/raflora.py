"""Products by direction, each weighted over its owners; then the best rank R."""

from rankfit.adapters.owners import OwnersProduct
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="raflora",
    summary="Products by direction, each weighted over its owners; then the best rank R.",
    source="raFLoRA",
    allocate=OwnRank(),
    schedule=both,
    merge=OwnersProduct,
)
