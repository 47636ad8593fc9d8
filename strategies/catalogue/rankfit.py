"""Product-space changes, merged exactly; untouched directions stay."""

from rankfit.adapters.merge import MeanChange
from rankfit.strategies.method import Method, both, own_rank

METHOD = Method(
    name="rankfit",
    summary="Product-space changes, merged exactly; untouched directions stay.",
    source="RankFit (this project); docs/methods.md",
    allocate=own_rank,
    schedule=both,
    phases=("both",),
    merge=MeanChange,
)
