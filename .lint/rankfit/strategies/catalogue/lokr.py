"""Kronecker factors in place of low-rank ones, averaged tensor by tensor at one rank."""

from rankfit.adapters.merge import AverageFactors
from rankfit.strategies.allocation import OneRank
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import both

METHOD = Method(
    name="lokr",
    summary="Kronecker factors W₁ ⊗ B·A, averaged tensor by tensor; one rank, the weakest's.",
    source="LoKr (arXiv:2309.14859), as HRALoRA's baseline",
    allocate=OneRank(),
    schedule=both,
    merge=AverageFactors,
    form="kronecker",
)
