"""Each direction averaged over the clients that trained it."""

from rankfit.adapters.owners import OwnersMean
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="rbla",
    summary="Each direction averaged over the clients that trained it.",
    source="RBLA (arXiv:2408.08699), FediLoRA, HAFLQ",
    allocate=OwnRank(),
    schedule=both,
    merge=OwnersMean,
)
