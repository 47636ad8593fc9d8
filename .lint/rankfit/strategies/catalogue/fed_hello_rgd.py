"""Whole layers drawn with a pattern as the prior; averaged over owners."""

from rankfit.adapters.owners import OwnersMean
from rankfit.strategies.layers import LayersDrawnByPattern
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="fed-hello-rgd",
    summary="Whole layers drawn with a pattern as the prior; averaged over owners.",
    source="Fed-HeLLo RGD-HLA (arXiv:2506.12213)",
    allocate=LayersDrawnByPattern(),
    schedule=both,
    merge=OwnersMean,
)
