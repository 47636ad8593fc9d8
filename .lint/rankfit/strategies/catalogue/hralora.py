"""Fisher-shared ranks, a warm-up, one factor a round, re-factorisation; each can be left out.

The warm-up is left out by ``method.warm-up-rounds=0``.
"""

from dataclasses import replace
from functools import partial

from rankfit.adapters.owners import OwnersMean
from rankfit.adapters.refactored import Refactored
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.layers import FisherShares
from rankfit.strategies.method import Method
from rankfit.strategies.schedule import WarmUp, b_then_a, both

METHOD = Method(
    name="hralora",
    summary="Layers and ranks by Fisher score, warm-up, one factor a round, re-factorised.",
    source="HRALoRA (CCGrid 2026)",
    allocate=FisherShares(),
    schedule=WarmUp(b_then_a),
    merge=partial(Refactored, inner=OwnersMean),
    parts={
        "fisher": lambda method: replace(method, allocate=OwnRank()),
        "alternation": lambda method: replace(method, schedule=both),
        "refactorisation": lambda method: replace(method, merge=OwnersMean),
    },
)
