"""Allocations: from what fits on each device to the rank of every module on every client.

The estimator gives each client the largest rank that it can train in all modules. Rank times
layers is its budget; an allocation spends it. Whatever an allocation asks for, the planner checks
against memory, upload and download, and lowers it where it does not fit.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from rankfit.configs.seeds import derive
from rankfit.configs.settings import ConfigError, RunSettings

log = logging.getLogger(__name__)

#: Client → module → rank; 0 or absent = no adapter there.
Ranks = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Choice:
    """What an allocation knows.

    Attributes
    ----------
    largest : Mapping[str, int]
        Largest rank, the same in all modules, that each client can train.
    modules : tuple[str, ...]
        Adapted modules in the model's order.
    round : int
        Round that is planned for, from 1.
    settings : RunSettings
        ``lora.rank`` is the global rank R.
    scores : Mapping[str, float]
        Importance of each module; empty before the first measurement.
    """

    largest: Mapping[str, int]
    modules: tuple[str, ...]
    round: int
    settings: RunSettings
    scores: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Modules of each layer, from the input up: those whose names agree up to the number."""
        groups: dict[str, list[str]] = {}
        for module in self.modules:
            found = re.match(r"(.*?\.\d+)(\.|$)", module)
            groups.setdefault(found.group(1) if found else module, []).append(module)
        return tuple(tuple(group) for group in groups.values())

    @property
    def layer_scores(self) -> list[float]:
        """Importance of each layer: the sum over its modules (1 before the first measurement)."""
        if not self.scores:
            return [1.0] * len(self.layers)
        return [sum(self.scores.get(m, 0.0) for m in layer) for layer in self.layers]

    @property
    def global_rank(self) -> int:
        """R."""
        return self.settings.lora.rank

    def budget(self, client: str) -> int:
        """Units of rank that a client can spread over its layers."""
        return self.largest[client] * len(self.layers)

    def seed(self, client: str) -> int:
        """Seed of a client's draw of layers; renewed every ``method.renew-every`` rounds."""
        period = (self.round - 1) // self.settings.method.renew_every
        return derive(self.settings.run.seed, "layers", client, period)

    def spread(self, by_layer: Mapping[int, int]) -> dict[str, int]:
        """Ranks of the modules from ranks of the layers."""
        return {module: rank for i, rank in by_layer.items() for module in self.layers[i] if rank}


class Allocation(ABC):
    """Who trains which rank of which module."""

    @abstractmethod
    def ranks(self, choice: Choice) -> Ranks:
        """Ranks of every client; one that is absent, or all at 0, takes no part.

        Raises
        ------
        ConfigError
            If the fleet cannot do what the method needs.
        """

    def scored(self, server_round: int, settings: RunSettings) -> bool:
        """Say whether importance scores are measured before this round."""
        return False


def renewed(server_round: int, settings: RunSettings) -> bool:
    """Say whether a round begins a new period of ``method.renew-every`` rounds."""
    return (server_round - 1) % settings.method.renew_every == 0


class OwnRank(Allocation):
    """Each client trains the largest rank that it can, in all modules."""

    def ranks(self, choice: Choice) -> Ranks:
        """See the base class."""
        return {
            client: dict.fromkeys(choice.modules, rank) for client, rank in choice.largest.items()
        }


class OneRank(Allocation):
    """Everybody trains the rank of the weakest: averaging of factors needs one rank."""

    def ranks(self, choice: Choice) -> Ranks:
        """See the base class."""
        weakest = min(choice.largest.values(), default=0)
        if len(set(choice.largest.values())) > 1:
            log.info(
                "one rank for all: %d, what the weakest of the clients can train (others: up to "
                "%d)", weakest, max(choice.largest.values()),
            )  # fmt: skip
        return {client: dict.fromkeys(choice.modules, weakest) for client in choice.largest}


class OnlyFullRank(Allocation):
    """Only clients that can train the global rank take part."""

    def ranks(self, choice: Choice) -> Ranks:
        """See the base class."""
        able = [c for c, rank in choice.largest.items() if rank >= choice.global_rank]
        if choice.largest and not able:
            raise ConfigError(
                f"no client can train lora.rank {choice.global_rank}, the largest is "
                f"{max(choice.largest.values())}; lower lora.rank, or choose a method for mixed "
                "ranks"
            )
        return {client: dict.fromkeys(choice.modules, choice.global_rank) for client in able}


class TopLayersRising(Allocation):
    """LEGEND: layers from the top down as far as the budget reaches, rank rising with depth.

    Layer l of L (1 = next to the input) has the rank max(1, round(R·l/L)), an arithmetic sequence
    that is the same for all clients; a client's depth follows from its budget
    (arXiv:2412.20004). A budget below the top layer's rank goes to that layer alone.
    """

    def ranks(self, choice: Choice) -> Ranks:
        """See the base class."""
        count, rank = len(choice.layers), choice.global_rank
        wanted = [max(1, round(rank * (layer + 1) / count)) for layer in range(count)]
        return {client: choice.spread(self._take(choice, client, wanted)) for client in
                choice.largest}  # fmt: skip

    @staticmethod
    def _take(choice: Choice, client: str, wanted: list[int]) -> dict[int, int]:
        left, taken = choice.budget(client), {}
        for layer in reversed(range(len(wanted))):
            if wanted[layer] > left:
                break
            taken[layer] = wanted[layer]
            left -= wanted[layer]
        return taken or {len(wanted) - 1: min(left, choice.global_rank)}
