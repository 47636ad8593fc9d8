"""Each client trains a random sketch of the global directions."""

from rankfit.adapters.merge import PaddedChange
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both
from rankfit.strategies.start import Drawn

METHOD = Method(
    name="fslora",
    summary="Each client trains a random sketch of the global directions.",
    source="FSLoRA (arXiv:2501.19389)",
    allocate=OwnRank(),
    schedule=both,
    merge=PaddedChange,
    start=Drawn(),
)
