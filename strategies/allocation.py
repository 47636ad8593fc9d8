"""Allocations: from what fits on each device to the rank of every module on every client."""

import logging
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from rankfit.adapters.names import Trainable
from rankfit.configs.settings import ConfigError, RunSettings, derive
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.plan import Plan

# The estimator imports PEFT, which takes seconds: whoever only looks a method up needs neither.
if TYPE_CHECKING:
    from rankfit.estimator.plan_search import Estimator
    from rankfit.estimator.round_time import Throughput

#: Shares of the ranks asked for that are tried, from all of them down.
_SHARES = [1 - 0.05 * i for i in range(20)]


@dataclass(frozen=True)
class Budget:
    """What one device can hold and move.

    Parameters
    ----------
    estimator : Estimator
        Of the phases of this stage of the run.
    report : DeviceReport
        The device.
    plan : Plan
        What fits at its largest rank in all modules: its micro-batch and checkpointing are kept.
    folded : bool
        Whether a frozen change of the base travels along, of rank up to min(d, k).
    throughput : Throughput or None
        What its rounds were measured to take (None = not measured, or no deadline).
    """

    estimator: "Estimator"
    report: DeviceReport
    plan: Plan
    folded: bool
    throughput: "Throughput | None" = None

    def fit(self, ranks: Mapping[str, int]) -> Plan | None:
        """The plan at these ranks, or at the largest share of them that fits; None = nothing does.

        A module that is absent or at rank 0 is left without adapter.
        """
        for share in _SHARES:
            asked = {m: int(rank * share + 1e-9) for m, rank in ranks.items()}
            found = self._try({module: rank for module, rank in asked.items() if rank > 0})
            if found is not None:
                return found
        # What fits in all modules fits in some of them.
        return self._try({m: min(rank, self.plan.rank) for m, rank in ranks.items() if rank > 0})

    def upload_bytes(self, ranks: Mapping[str, int], phases: Sequence[Trainable]) -> int:
        """Bytes that come back in the largest of the phases, head included."""
        payload = self.estimator.payload
        return payload.head_bytes + max(
            sum(rank * payload.direction_bytes(module, trainable) for module, rank in ranks.items())
            for trainable in phases
        )

    def download_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes that go out, head and frozen part included."""
        payload, frozen = self.estimator.payload, self.frozen(ranks)
        return payload.head_bytes + sum(
            (ranks.get(module, 0) + frozen.get(module, 0)) * payload.direction_bytes(module)
            for module in payload.shapes
        )

    def frozen(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Largest rank of the frozen directions beside these: of a fold or a remainder, or none."""
        shapes = self.estimator.payload.shapes
        if self.folded:
            return {module: min(shape) for module, shape in shapes.items()}
        if not self.plan.remainder_rank:
            return {}
        return {
            module: max(0, self.plan.remainder_rank - ranks.get(module, 0)) for module in shapes
        }

    @cached_property
    def memory_bytes(self) -> int:
        """Bytes of memory, without the margin that is kept free."""
        return self.report.budget_bytes - int(self.estimator.settings.plan.margin_mib * 2**20)

    def _try(self, ranks: Mapping[str, int]) -> Plan | None:
        if not ranks:
            return None
        settings, report = self.estimator.settings.plan, self.report
        up = self.upload_bytes(ranks, self.estimator.phases)
        if not _travels(up, settings.upload_seconds, report.upload_mbps):
            return None
        if not _travels(
            self.download_bytes(ranks), settings.download_seconds, report.download_mbps
        ):
            return None
        if not self._in_time(ranks):
            return None
        whole = set(ranks) == set(self.estimator.spec.targets)
        if not self.folded and whole and set(ranks.values()) == {self.plan.rank}:
            return self.plan
        planned = self._price(ranks, whole)
        return planned if planned.peak_bytes <= self.memory_bytes else None

    def _in_time(self, ranks: Mapping[str, int]) -> bool:
        """Whether these ranks are trained within ``plan.deadline-seconds``."""
        deadline = self.estimator.settings.plan.deadline_seconds
        if self.throughput is None or deadline == 0:
            return True
        flops = self.estimator.flops(replace(self.plan, ranks=dict(ranks)))
        return self.throughput.seconds(flops) <= deadline

    def _price(self, ranks: Mapping[str, int], whole: bool) -> Plan:
        """The plan at ranks, with its expected peak."""
        frozen = self.frozen(ranks)
        planned = self.estimator.lower(self.report, replace(self.plan, remainder_rank=0), ranks)
        if not frozen:
            return planned
        if not self.folded and whole:
            return self.estimator.lower(self.report, self.plan, ranks)
        # The memory model knows no module with a frozen adapter alone: rank 1 stands in for 0.
        stand_in = {m: max(1, ranks.get(m, 0)) for m in self.estimator.spec.targets}
        from rankfit.estimator.plan_search import Step

        step = Step.of(planned)
        footprint = self.estimator.footprint(self.report, step, stand_in, remainder=True)
        peak = footprint.expected(stand_in, frozen, self.memory_bytes)
        total = max(ranks.get(m, 0) + rank for m, rank in frozen.items())
        return replace(planned, peak_bytes=peak, remainder_rank=total)


def _travels(nbytes: int, seconds: float, mbps: float) -> bool:
    """Whether bytes pass a link in time; 0 s or 0 Mbps = no bound."""
    from rankfit.estimator.round_time import link_bytes

    return not seconds or not mbps or nbytes <= link_bytes(seconds, mbps)


log = logging.getLogger(__name__)

#: Client → module → rank; 0 or absent = no adapter there.
Ranks = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class AllocationContext:
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
    def ranks(self, context: AllocationContext) -> Ranks:
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

    def ranks(self, context: AllocationContext) -> Ranks:
        """See the base class."""
        return {
            client: dict.fromkeys(context.modules, rank) for client, rank in context.largest.items()
        }


class OneRank(Allocation):
    """Everybody trains the rank of the weakest: averaging of factors needs one rank."""

    def ranks(self, context: AllocationContext) -> Ranks:
        """See the base class."""
        weakest = min(context.largest.values(), default=0)
        if len(set(context.largest.values())) > 1:
            log.info(
                "one rank for all: %d, what the weakest of the clients can train (others: up to "
                "%d)", weakest, max(context.largest.values()),
            )  # fmt: skip
        return {client: dict.fromkeys(context.modules, weakest) for client in context.largest}


class OnlyFullRank(Allocation):
    """Only clients that can train the global rank take part."""

    def ranks(self, context: AllocationContext) -> Ranks:
        """See the base class."""
        able = [c for c, rank in context.largest.items() if rank >= context.global_rank]
        if context.largest and not able:
            raise ConfigError(
                f"no client can train lora.rank {context.global_rank}, the largest is "
                f"{max(context.largest.values())}; lower lora.rank, or choose a method for mixed "
                "ranks"
            )
        return {client: dict.fromkeys(context.modules, context.global_rank) for client in able}


class TopLayersRising(Allocation):
    """LEGEND: layers from the top down as far as the budget reaches, rank rising with depth.

    Layer l of L (1 = next to the input) has the rank max(1, round(R·l/L)), an arithmetic sequence
    that is the same for all clients; a client's depth follows from its budget
    (arXiv:2412.20004). A budget below the top layer's rank goes to that layer alone.
    """

    def ranks(self, context: AllocationContext) -> Ranks:
        """See the base class."""
        count, rank = len(context.layers), context.global_rank
        wanted = [max(1, round(rank * (layer + 1) / count)) for layer in range(count)]
        return {client: context.spread(self._take(context, client, wanted)) for client in
                context.largest}  # fmt: skip

    @staticmethod
    def _take(context: AllocationContext, client: str, wanted: list[int]) -> dict[int, int]:
        left, taken = context.budget(client), {}
        for layer in reversed(range(len(wanted))):
            if wanted[layer] > left:
                break
            taken[layer] = wanted[layer]
            left -= wanted[layer]
        return taken or {len(wanted) - 1: min(left, context.global_rank)}


#: HRALoRA: relative probability of a layer by the cluster of its score, from the lowest.
CLUSTER_WEIGHTS = (1.0, 2.0, 3.0)


def clusters(values: Sequence[float], count: int) -> list[int]:
    """Group numbers into at most ``count`` clusters by exact 1-D k-means, from the lowest.

    An optimal clustering of numbers is one of contiguous runs of their order, so all cuts are
    tried: no start to draw, no iteration that may not end. Equal values share a cluster.
    """
    times = Counter(values)
    distinct = sorted(times)
    count = min(count, len(distinct))

    def spread(start: int, stop: int) -> float:
        part = np.repeat(distinct[start:stop], [times[value] for value in distinct[start:stop]])
        return float(((part - part.mean()) ** 2).sum())

    best: tuple[float, tuple[int, ...]] = (float("inf"), ())
    for cuts in combinations(range(1, len(distinct)), count - 1):
        edges = (0, *cuts, len(distinct))
        cost = sum(spread(edges[i], edges[i + 1]) for i in range(count))
        best = min(best, (cost, cuts))
    return [sum(value >= distinct[cut] for cut in best[1]) for value in values]


def draw_layers(weights: Sequence[float], count: int, seed: int) -> list[int]:
    """Draw ``count`` different layers, each draw in proportion to the weights that are left."""
    total = float(sum(weights))
    chances = np.array(weights, dtype=np.float64) if total > 0 else np.ones(len(weights))
    # A layer of weight 0 is drawn only when all others are taken.
    chances = np.maximum(chances, chances.max() * 1e-9)
    generator = np.random.default_rng(seed)
    drawn = generator.choice(len(weights), min(count, len(weights)), False, chances / chances.sum())
    return sorted(int(layer) for layer in drawn)


def pattern_weights(pattern: str, layers: int) -> list[float]:
    """Fed-HeLLo's geometric patterns over the layers, from the input up (arXiv:2506.12213).

    ``triangle`` is wide at the input, ``inverted-triangle`` at the output, ``bottleneck`` at both
    ends; ``uniform`` treats all alike.
    """
    depth = range(layers)
    return {
        "triangle": [float(layers - layer) for layer in depth],
        "inverted-triangle": [float(layer + 1) for layer in depth],
        "bottleneck": [abs(layer - (layers - 1) / 2) + 1.0 for layer in depth],
        "uniform": [1.0] * layers,
    }[pattern]


def heaviest(pattern: str, layers: int, count: int) -> list[int]:
    """The layers that a client with ``count`` of them trains under a fixed pattern."""
    if pattern == "uniform":  # evenly spaced, the top one among them
        return sorted({layers - 1 - (i * layers) // count for i in range(count)})
    weights = pattern_weights(pattern, layers)
    # Between equals (the two ends of a bottleneck) the upper one comes first.
    return sorted(sorted(range(layers), key=lambda i: (-weights[i], -i))[:count])


class WholeLayers(Allocation):
    """Fed-HeLLo: as many layers at the global rank as the budget holds; which, a subclass says.

    A budget below one layer at that rank is one layer at a lower one.
    """

    def ranks(self, context: AllocationContext) -> Ranks:
        """See the base class."""
        result = {}
        for client in context.largest:
            budget, layers = context.budget(client), len(context.layers)
            count = min(layers, max(1, budget // context.global_rank))
            rank = min(context.global_rank, budget // count)
            result[client] = context.spread(dict.fromkeys(self.pick(context, client, count), rank))
        return result

    @abstractmethod
    def pick(self, context: AllocationContext, client: str, count: int) -> list[int]:
        """Layers of one client."""


class LayersByFisher(WholeLayers):
    """FIM-HLA: layers drawn with chances in proportion to their Fisher scores."""

    def pick(self, context: AllocationContext, client: str, count: int) -> list[int]:
        """See the base class."""
        return draw_layers(context.layer_scores, count, context.seed(client))

    def scored(self, server_round: int, settings: RunSettings) -> bool:
        """See the base class."""
        return renewed(server_round, settings)


class LayersByPattern(WholeLayers):
    """GD-HLA: the layers that are heaviest in ``method.pattern``."""

    def pick(self, context: AllocationContext, client: str, count: int) -> list[int]:
        """See the base class."""
        return heaviest(context.settings.method.pattern, len(context.layers), count)


class LayersDrawnByPattern(WholeLayers):
    """RGD-HLA: layers drawn with ``method.pattern`` as the prior."""

    def pick(self, context: AllocationContext, client: str, count: int) -> list[int]:
        """See the base class."""
        weights = pattern_weights(context.settings.method.pattern, len(context.layers))
        return draw_layers(weights, count, context.seed(client))


@dataclass(frozen=True)
class FisherShares(Allocation):
    """HRALoRA: layers drawn by clusters of Fisher scores, ranks shared by the scores.

    After the warm-up, in which every layer has the same rank (the paper doubles it there, which
    breaks the upload budget; here it is what fits with both factors moving). A client with a share
    ρ of the largest budget draws ⌈ρ·L⌉ layers with chances 1:2:3 by three clusters of the layers'
    scores, and gives layer l min(R, m + F_l/ΣF · (budget − m·layers)) with m = ⌈R/5⌉; what the cap
    left over goes to the highest scores first (CCGrid 2026).
    """

    def ranks(self, context: AllocationContext) -> Ranks:
        """See the base class."""
        if context.round <= context.settings.method.warm_up_rounds:
            return OwnRank().ranks(context)
        largest = max(context.largest.values(), default=0)
        return {
            client: context.spread(self._client(context, client, rank / largest))
            for client, rank in context.largest.items()
            if rank > 0
        }

    def scored(self, server_round: int, settings: RunSettings) -> bool:
        """See the base class."""
        after = server_round - settings.method.warm_up_rounds
        return after >= 1 and renewed(after, settings)

    @staticmethod
    def _client(context: AllocationContext, client: str, ratio: float) -> dict[int, int]:
        scores, budget, cap = context.layer_scores, context.budget(client), context.global_rank
        least = min(-(-cap // 5), budget)
        count = min(max(1, math.ceil(ratio * len(scores) - 1e-9)), max(1, budget // least))
        weights = [CLUSTER_WEIGHTS[c] for c in clusters(scores, len(CLUSTER_WEIGHTS))]
        layers = draw_layers(weights, count, context.seed(client))
        shares = shared_ranks([scores[layer] for layer in layers], budget, least, cap)
        return dict(zip(layers, shares, strict=True))


def shared_ranks(scores: Sequence[float], budget: int, least: int, cap: int) -> list[int]:
    """Share a budget of rank among layers by score, each between ``least`` and ``cap``.

    Never negative, never above the budget in sum, and done after one pass: a budget above
    cap · layers leaves a rest unspent, and a total score of zero shares alike. Source of the
    formula, and of the three errors that its published code makes: HRALoRA (CCGrid 2026).

    Raises
    ------
    ValueError
        If the budget is below ``least`` for each layer.
    """
    if budget < least * len(scores) or cap < least:
        raise ValueError(
            f"a budget of {budget} cannot give {len(scores)} layers {least} each up to {cap}"
        )
    total = sum(scores)
    parts = [score / total for score in scores] if total > 0 else [1 / len(scores)] * len(scores)
    spare = budget - least * len(scores)
    ranks = [min(cap, least + int(part * spare)) for part in parts]
    left = budget - sum(ranks)
    for layer in sorted(range(len(scores)), key=lambda i: -scores[i]):
        more = min(cap - ranks[layer], left)
        ranks[layer] += more
        left -= more
    return ranks
