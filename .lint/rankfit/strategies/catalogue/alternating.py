"""One factor a round at mixed ranks; padded weighted changes, exact."""

from rankfit.adapters.merge import PaddedChange
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import b_then_a

METHOD = Method(
    name="alternating",
    summary="One factor a round at mixed ranks; padded weighted changes, exact.",
    source="RoLoRA (arXiv:2409.02346) at mixed ranks, as in HRALoRA (CCGrid 2026)",
    allocate=OwnRank(),
    schedule=b_then_a,
    merge=PaddedChange,
)
