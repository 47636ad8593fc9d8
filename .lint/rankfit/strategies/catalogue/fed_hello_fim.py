"""Whole layers drawn by Fisher score; averaged over owners."""

from rankfit.adapters.owners import OwnersMean
from rankfit.strategies.layers import LayersByFisher
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="fed-hello-fim",
    summary="Whole layers drawn by Fisher score; averaged over owners.",
    source="Fed-HeLLo FIM-HLA (arXiv:2506.12213)",
    allocate=LayersByFisher(),
    schedule=both,
    merge=OwnersMean,
)
