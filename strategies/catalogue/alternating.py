"""One factor a round; padded weighted changes, exact at mixed ranks."""

from rankfit.adapters.merge import PaddedChange
from rankfit.strategies.method import Method, b_then_a, own_rank

METHOD = Method(
    name="alternating",
    summary="One factor a round; padded weighted changes, exact at mixed ranks.",
    source="RoLoRA (arXiv:2409.02346) at mixed ranks, as in HRALoRA (CCGrid 2026)",
    allocate=own_rank,
    schedule=b_then_a,
    phases=("b", "a"),
    merge=PaddedChange,
)
