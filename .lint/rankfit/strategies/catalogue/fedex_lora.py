"""Plain averages; what they miss of the mean is folded into the base."""

from rankfit.adapters.folding import AverageAndResidual
from rankfit.strategies.allocation import OneRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both
from rankfit.strategies.start import LeadingOnFolded

METHOD = Method(
    name="fedex-lora",
    summary="Plain averages; what they miss of the mean is folded into the base.",
    source="FedEx-LoRA (arXiv:2410.09432)",
    allocate=OneRank(),
    schedule=both,
    merge=AverageAndResidual,
    start=LeadingOnFolded(),
)
