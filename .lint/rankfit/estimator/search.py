"""The plan search: what may change in a training step, cheapest in training time first."""

from dataclasses import dataclass
from typing import Self

from rankfit.configs.learning import BITS
from rankfit.configs.settings import RunSettings, split_list
from rankfit.estimator.plan import Plan


@dataclass(frozen=True)
class Step:
    """One step of the plan search; every step has the same effective batch."""

    micro_batch: int
    accumulation: int
    checkpointing: bool
    precision: str = "fp32"

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The step that a plan is at."""
        return cls(plan.micro_batch, plan.accumulation, plan.checkpointing, plan.precision)

    def __str__(self) -> str:
        text = f"micro-batch {self.micro_batch}"
        text += " with checkpointing" if self.checkpointing else ""
        return f"{text}, {self.precision} base"


def steps(settings: RunSettings, *, can_checkpoint: bool, group_size: int = 1) -> list[Step]:
    """Steps that the run config allows, in their order.

    As configured, smaller micro-batches, checkpointing, and then the same in each lower precision
    of the frozen base that ``plan.precisions`` names.

    Of ``group_size`` processes that share each batch, each takes a part, rounded up.

    Checkpointing starts again at the whole batch: it costs the same time at any micro-batch, and a
    small micro-batch costs more.
    """
    search = split_list(settings.plan.search)
    batch = -(-settings.train.batch_size // group_size)
    sizes = halvings(batch) if "micro-batch" in search else [batch]
    checkpointing = [settings.train.gradient_checkpointing]
    if "checkpointing" in search and can_checkpoint and True not in checkpointing:
        checkpointing.append(True)
    own = settings.model.base_precision
    lower = [each for each in split_list(settings.plan.precisions) if BITS[each] < BITS[own]]
    return [
        Step(size, batch // size, each, precision)
        for precision in (own, *lower)
        for each in checkpointing
        for size in sizes
    ]


def halvings(batch: int) -> list[int]:
    """Micro-batches to try: divisors of the batch, each at most half of the one before."""
    sizes = [batch]
    for size in range(batch // 2, 0, -1):
        if batch % size == 0 and size <= sizes[-1] // 2:
            sizes.append(size)
    return sizes
