"""Whole layers by a fixed pattern (method.pattern); averaged over owners."""

from rankfit.adapters.owners import OwnersMean
from rankfit.strategies.layers import LayersByPattern
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="fed-hello-gd",
    summary="Whole layers by a fixed pattern (method.pattern); averaged over owners.",
    source="Fed-HeLLo GD-HLA (arXiv:2506.12213)",
    allocate=LayersByPattern(),
    schedule=both,
    merge=OwnersMean,
)
