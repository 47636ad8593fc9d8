"""Zero-padded factors weighted by the norm of the product; self-pruning."""

from dataclasses import replace

from rankfit.adapters.merge import ZeroPadded
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="hetlora",
    summary="Zero-padded factors weighted by the norm of the product; self-pruning.",
    source="HetLoRA (arXiv:2401.06432)",
    allocate=OwnRank(),
    schedule=both,
    merge=ZeroPadded,
    extras=("prune",),
    parts={"self-pruning": lambda method: replace(method, extras=())},
)
