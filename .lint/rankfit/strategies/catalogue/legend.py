"""Layers from the top down, rank rising with depth; averaged over owners."""

from rankfit.adapters.owners import OwnersMean
from rankfit.strategies.allocation import TopLayersRising
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="legend",
    summary="Layers from the top down, rank rising with depth; averaged over owners.",
    source="LEGEND (arXiv:2412.20004)",
    allocate=TopLayersRising(),
    schedule=both,
    merge=OwnersMean,
)
