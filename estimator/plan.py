"""The plan: what one client does in one round. Free of torch and of Flower."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rankfit.adapters.names import Rates, Trainable

#: What a client does beside plain training: ``prune`` its own rank (HetLoRA), measure ``scores``.
Extra = Literal["prune", "scores"]
Binding = Literal["memory", "upload", "download", "time", "cap", "method", "precision"]
Value = str | int | float | bool | list[str] | list[int]


@dataclass(frozen=True)
class Plan:
    """What one client trains, how, and what it is expected to take.

    Attributes
    ----------
    ranks : Mapping[str, int]
        Trained rank of each adapted module (names as in the base model).
    trainable : {"both", "a", "b"}
        Which factors are trained and returned this round.
    micro_batch, accumulation : int
        Samples per forward pass, and passes per optimizer step.
    checkpointing : bool
        Gradient checkpointing.
    peak_bytes : int
        Expected peak of device memory of the training process, context included.
    budget_bytes : int
        What the device has for it.
    binding : str
        The constraint that kept the rank from being larger.
    remainder_rank : int
        Total rank of the frozen second adapter plus the trained one (0 = no remainder).
    extras : tuple[Extra, ...]
        What the client does beside plain training.
    precision : str
        Of the frozen base: fp32, bf16, fp16, int8 or nf4.
    rates : Rates
        How fast factors and head learn, by Adam.
    outside_bytes : int
        What of the peak lies outside of a GPU's allocator: CUDA's context, NCCL's buffers.
    """

    ranks: Mapping[str, int]
    trainable: Trainable
    micro_batch: int
    accumulation: int
    checkpointing: bool
    peak_bytes: int
    budget_bytes: int
    binding: Binding
    remainder_rank: int = 0
    extras: tuple[Extra, ...] = ()
    precision: str = "fp32"
    rates: Rates = Rates()
    outside_bytes: int = 0

    @property
    def rank(self) -> int:
        """Largest rank of any module, the figure shown in tables."""
        return max(self.ranks.values(), default=0)

    def to_dict(self) -> dict[str, Value]:
        """Flat record with kebab-case keys, as it travels in the message."""
        return {
            "modules": list(self.ranks),
            "ranks": list(self.ranks.values()),
            "trainable": self.trainable,
            "micro-batch": self.micro_batch,
            "accumulation": self.accumulation,
            "checkpointing": self.checkpointing,
            "peak-bytes": self.peak_bytes,
            "budget-bytes": self.budget_bytes,
            "binding": self.binding,
            "remainder-rank": self.remainder_rank,
            "extras": ",".join(self.extras),
            "precision": self.precision,
            "rank-power": self.rates.rank_power,
            "row-step": self.rates.row_step,
            "whole-head": self.rates.whole_head,
            "outside-bytes": self.outside_bytes,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> "Plan":
        """Inverse of :meth:`to_dict`; raises ``KeyError`` for a missing field."""
        modules, ranks = record["modules"], record["ranks"]
        assert isinstance(modules, Sequence) and isinstance(ranks, Sequence)
        return cls(
            ranks=dict(zip(modules, ranks, strict=True)),
            trainable=record["trainable"],  # type: ignore[arg-type]
            micro_batch=record["micro-batch"],  # type: ignore[arg-type]
            accumulation=record["accumulation"],  # type: ignore[arg-type]
            checkpointing=bool(record["checkpointing"]),
            peak_bytes=record["peak-bytes"],  # type: ignore[arg-type]
            budget_bytes=record["budget-bytes"],  # type: ignore[arg-type]
            binding=record["binding"],  # type: ignore[arg-type]
            remainder_rank=record["remainder-rank"],  # type: ignore[arg-type]
            extras=tuple(str(record["extras"]).split(",")) if record["extras"] else (),  # type: ignore[arg-type]
            precision=str(record["precision"]),
            rates=Rates(  # reports of runs of older releases have none
                float(record.get("rank-power", 0.0)),  # type: ignore[arg-type]
                float(record.get("row-step", 0.0)),  # type: ignore[arg-type]
                bool(record.get("whole-head", False)),
            ),
            outside_bytes=int(record.get("outside-bytes", 0)),  # type: ignore[call-overload]
        )
