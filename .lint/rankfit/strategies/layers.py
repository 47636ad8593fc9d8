"""Allocations by layer: Fed-HeLLo's and HRALoRA's, with clusters, draws and shares of a budget."""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rankfit.configs.settings import RunSettings
from rankfit.strategies.allocation import Allocation, Choice, OwnRank, Ranks, renewed

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

    def ranks(self, choice: Choice) -> Ranks:
        """See the base class."""
        result = {}
        for client in choice.largest:
            budget, layers = choice.budget(client), len(choice.layers)
            count = min(layers, max(1, budget // choice.global_rank))
            rank = min(choice.global_rank, budget // count)
            result[client] = choice.spread(dict.fromkeys(self.pick(choice, client, count), rank))
        return result

    @abstractmethod
    def pick(self, choice: Choice, client: str, count: int) -> list[int]:
        """Layers of one client."""


class LayersByFisher(WholeLayers):
    """FIM-HLA: layers drawn with chances in proportion to their Fisher scores."""

    def pick(self, choice: Choice, client: str, count: int) -> list[int]:
        """See the base class."""
        return draw_layers(choice.layer_scores, count, choice.seed(client))

    def scored(self, server_round: int, settings: RunSettings) -> bool:
        """See the base class."""
        return renewed(server_round, settings)


class LayersByPattern(WholeLayers):
    """GD-HLA: the layers that are heaviest in ``method.pattern``."""

    def pick(self, choice: Choice, client: str, count: int) -> list[int]:
        """See the base class."""
        return heaviest(choice.settings.method.pattern, len(choice.layers), count)


class LayersDrawnByPattern(WholeLayers):
    """RGD-HLA: layers drawn with ``method.pattern`` as the prior."""

    def pick(self, choice: Choice, client: str, count: int) -> list[int]:
        """See the base class."""
        weights = pattern_weights(choice.settings.method.pattern, len(choice.layers))
        return draw_layers(weights, count, choice.seed(client))


@dataclass(frozen=True)
class FisherShares(Allocation):
    """HRALoRA: layers drawn by clusters of Fisher scores, ranks shared by the scores.

    After the warm-up, in which every layer has the same rank (the paper doubles it there, which
    breaks the upload budget; here it is what fits with both factors moving). A client with a share
    ρ of the largest budget draws ⌈ρ·L⌉ layers with chances 1:2:3 by three clusters of the layers'
    scores, and gives layer l min(R, m + F_l/ΣF · (budget − m·layers)) with m = ⌈R/5⌉; what the cap
    left over goes to the highest scores first (CCGrid 2026).
    """

    def ranks(self, choice: Choice) -> Ranks:
        """See the base class."""
        if choice.round <= choice.settings.method.warm_up_rounds:
            return OwnRank().ranks(choice)
        largest = max(choice.largest.values(), default=0)
        return {
            client: choice.spread(self._client(choice, client, rank / largest))
            for client, rank in choice.largest.items()
            if rank > 0
        }

    def scored(self, server_round: int, settings: RunSettings) -> bool:
        """See the base class."""
        after = server_round - settings.method.warm_up_rounds
        return after >= 1 and renewed(after, settings)

    @staticmethod
    def _client(choice: Choice, client: str, ratio: float) -> dict[int, int]:
        scores, budget, cap = choice.layer_scores, choice.budget(client), choice.global_rank
        least = min(-(-cap // 5), budget)
        count = min(max(1, math.ceil(ratio * len(scores) - 1e-9)), max(1, budget // least))
        weights = [CLUSTER_WEIGHTS[c] for c in clusters(scores, len(CLUSTER_WEIGHTS))]
        layers = draw_layers(weights, count, choice.seed(client))
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
