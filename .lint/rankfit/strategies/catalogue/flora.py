"""All factors stacked, exact, and folded into the base each round."""

from rankfit.adapters.folding import Stacked
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both
from rankfit.strategies.start import LeadingOnFolded

METHOD = Method(
    name="flora",
    summary="All factors stacked, exact, and folded into the base each round.",
    source="FLoRA (arXiv:2409.05976)",
    allocate=OwnRank(),
    schedule=both,
    merge=Stacked,
    start=LeadingOnFolded(),
)
