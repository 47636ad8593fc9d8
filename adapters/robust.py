"""Merging where some clients may be hostile: lengths and distances of changes, and robust means.

A change is s·(B·A − B⁰·A⁰) of each module, and that of the head. Products are never formed: inner
products of two changes are traces of small matrices, ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), at any
ranks. The factors and the head are measured apart (their numbers are of different sizes), and
distances are the sum of both, each relative to its median over the pairs.

Two kinds of robust merges:

- Krum, multi-Krum and the geometric median choose weights of whole updates; the method's own merge
  then takes them. They need all updates of a round.
- the trimmed mean and the median vote on each number of each direction among the clients that
  trained that direction (:class:`Vote`); they keep all updates until the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import Merge, Update

#: Votes that a direction needs; where fewer clients trained it, votes of no change are added, so
#: that no client alone, and no two that do not agree, move it.
VOTES = 3
#: Steps of the geometric median, and the change of its weights at which it has settled.
STEPS, SETTLED = 200, 1e-9


@dataclass(frozen=True)
class Length:
    """Frobenius norms of a change: of all products together, and of the head."""

    factors: float
    head: float


def change_of(before: Factors, after: Factors, scale: float) -> Factors:
    """s·(B·A − B⁰·A⁰) of one module as a pair of factors: (B − B⁰)·A + B⁰·(A − A⁰)."""
    old_b, old_a, new_b, new_a = (t.double() for t in (before.b, before.a, after.b, after.a))
    b = scale * torch.cat([new_b - old_b, old_b], 1)  # (d, 2r)
    return Factors(b, torch.cat([new_a, new_a - old_a], 0))  # (2r, k)


def length(given: Adapter, trained: Adapter) -> Length:
    """How long a change is; both adapters have one scale and the same shapes."""
    square = 0.0
    for module, after in trained.factors.items():
        own = change_of(given.factors[module], after, trained.scale)
        square += float(((own.b.T @ own.b) * (own.a @ own.a.T)).sum())
    heads = sum(
        float((trained.head[n].double() - t.double()).square().sum()) for n, t in given.head.items()
    )
    return Length(math.sqrt(max(0.0, square)), math.sqrt(heads))


def shortened(update: Update, factors: float, head: float) -> Update:
    """The update moved towards what was given until its change is at most so long.

    All factors go the same share t of their way, so that the change of the products is
    t·X + t²·Y with X = ΔB·A⁰ + B⁰·ΔA and Y = ΔB·ΔA; t is found by halving.
    """
    given, trained = update.given, update.trained
    own = length(given, trained)
    share_head = min(1.0, head / own.head) if own.head > 0 else 1.0
    share = 1.0
    if own.factors > factors:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            far = length(given, _between(given, trained, middle, 1.0)).factors > factors
            low, high = (low, middle) if far else (middle, high)
        share = low
    return replace(update, trained=_between(given, trained, share, share_head))


def _between(given: Adapter, trained: Adapter, factors: float, head: float) -> Adapter:
    """The point at a share of the way from what was given to what was trained."""
    moved = {
        module: Factors(
            given.factors[module].b.lerp(own.b, factors),
            given.factors[module].a.lerp(own.a, factors),
        )
        for module, own in trained.factors.items()
    }
    heads = {name: given.head[name].lerp(own, head) for name, own in trained.head.items()}
    return Adapter(moved, trained.scale, heads)


def grams(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Inner products of all changes, (n, n) each: of the products, and of the heads."""
    count = len(updates)
    factors = torch.zeros(count, count, dtype=torch.float64)
    for module in dict.fromkeys(module for own in updates for module in own.trained.factors):
        having = [i for i, own in enumerate(updates) if module in own.trained.factors]
        changes = [
            change_of(
                updates[i].given.factors[module],
                updates[i].trained.factors[module],
                updates[i].trained.scale,
            )
            for i in having
        ]
        left = torch.cat([change.b for change in changes], 1)  # (d, N)
        right = torch.cat([change.a for change in changes], 0)  # (N, k)
        ranks = torch.tensor([change.rank for change in changes])
        owner = torch.tensor(having).repeat_interleave(ranks)
        each = (left.T @ left) * (right @ right.T)  # (N, N)
        rows = torch.zeros(count, len(owner), dtype=torch.float64).index_add_(0, owner, each)
        factors.index_add_(1, owner, rows)
    heads = torch.stack([_head_change(update) for update in updates])  # (n, numbers)
    return factors, heads @ heads.T


def _head_change(update: Update) -> Tensor:
    """The change of the head, laid end to end."""
    before = update.given.head
    parts = [(t.double() - before[n].double()).flatten() for n, t in update.trained.head.items()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def scaled_gram(updates: Sequence[Update]) -> Tensor:
    """Inner products of changes whose factors and heads count alike, (n, n).

    Each part is divided by the median of its squared distances over the pairs of clients.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for gram in grams(updates):
        between = distances(gram)[torch.triu_indices(len(updates), len(updates), 1).unbind()]
        usual = float(between.median()) if len(between) else 0.0
        if usual > 0:
            total += gram / usual
    return total


def distances(gram: Tensor) -> Tensor:
    """Squared distances of all pairs from their inner products, (n, n)."""
    squares = gram.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)


def krum(updates: Sequence[Update], hostile: int) -> list[int]:
    """Updates by Krum's score, the best first: the squared distances to n − f − 2 others, added up.

    Source: arXiv:1703.02757. Multi-Krum merges the first n − f of them. ``hostile`` (f) is lowered
    to (n − 3)/2, beyond which no majority is left to be near to.
    """
    count = len(updates)
    if count < 3:
        return list(range(count))
    near = count - min(hostile, max(0, (count - 3) // 2)) - 2
    apart = distances(scaled_gram(updates))
    apart.fill_diagonal_(math.inf)
    scores = apart.sort(dim=1).values[:, : max(1, near)].sum(dim=1)
    return scores.argsort(stable=True).tolist()


def agreeing(updates: Sequence[Update]) -> list[int]:
    """Updates whose changes point the same way as those of the others.

    The one with the least sum of cosines to the others is left out as long as that sum is below 0,
    so that those who point against the majority go first, and no longer count for the others.
    Clients of few classes point aside, not against: they stay.
    """
    cosines = _cosines(updates).fill_diagonal_(0.0)
    kept = list(range(len(updates)))
    while len(kept) > 2:
        sums = cosines[kept][:, kept].sum(dim=1)
        least = int(sums.argmin())
        if float(sums[least]) >= 0:
            break
        del kept[least]
    return kept


def agreement(updates: Sequence[Update]) -> list[float]:
    """Cosine of each change to the sum of the others' directions, whatever their lengths."""
    cosines = _cosines(updates)
    found = []
    for own in range(len(updates)):
        others = [other for other in range(len(updates)) if other != own]
        whole = float(cosines[others][:, others].sum())
        found.append(float(cosines[own, others].sum()) / math.sqrt(max(whole, 1e-300)))
    return found


def _cosines(updates: Sequence[Update]) -> Tensor:
    """Cosines of all pairs of changes, (n, n)."""
    gram = scaled_gram(updates)
    norms = gram.diagonal().clamp(min=1e-300).sqrt()
    return gram / norms[:, None] / norms[None, :]


def geometric_median(updates: Sequence[Update]) -> list[float]:
    """Weights, adding up to 1, with which the mean of the changes is their geometric median.

    The point from which the distances, times the updates' own weights, add up to least (smoothed
    Weiszfeld steps, RFA, arXiv:1912.13445). It moves little, whatever less than half of the weight
    says.
    """
    gram = scaled_gram(updates)
    own = torch.tensor([update.weight for update in updates], dtype=torch.float64)
    own = own / own.sum()
    weights = own
    for _ in range(STEPS):
        square = gram.diagonal() - 2 * gram @ weights + weights @ gram @ weights
        apart = square.clamp(min=0).sqrt()
        following = own / apart.clamp(min=1e-6 * float(apart.max().clamp(min=1e-300)))
        following = following / following.sum()
        settled = float((following - weights).abs().max()) < SETTLED
        weights = following
        if settled:
            break
    return weights.tolist()


class Vote(Merge):
    """The next factors are the global ones plus, number by number, a vote of the clients' changes.

    On each direction those vote who trained it, all alike whatever their samples; where these are
    fewer than :data:`VOTES`, votes of no change are added. The head is voted on as well.

    Parameters
    ----------
    trimmed : float or None
        Share of the votes that is left out at each end, the rest being averaged (trimmed mean);
        None = the median.
    """

    def __init__(self, reference: Adapter, seed: int, *, trimmed: float | None) -> None:
        super().__init__(reference, seed)
        self._trimmed = trimmed
        self._updates: list[Update] = []

    def _add_factors(self, update: Update) -> None:
        self._updates.append(update)

    def _finish_head(self) -> dict[str, Tensor]:
        return {
            name: own + self._vote(torch.stack([u.trained.head[name] - own for u in self._updates]))
            for name, own in self.reference.head.items()
        }

    def _finish_module(self, module: str) -> Factors:
        own = self.reference.factors[module]
        b, a = own.b.clone(), own.a.clone()
        places: dict[tuple[int, int], int] = {}  # (update, direction) → which of its own it is
        trained_by: dict[int, list[int]] = {}
        for i, update in enumerate(self._updates):
            if module in update.trained.factors:
                for place, direction in enumerate(update.directions(module).tolist()):
                    places[i, direction] = place
                    trained_by.setdefault(direction, []).append(i)
        # Directions that the same clients trained are voted on together.
        owners: dict[tuple[int, ...], list[int]] = {}
        for direction, group in trained_by.items():
            owners.setdefault(tuple(group), []).append(direction)
        for voters, directions in owners.items():
            columns, rows = [], []
            for i in voters:
                update, at = self._updates[i], [places[i, j] for j in directions]
                after, before = update.trained.factors[module], update.given.factors[module]
                columns.append(after.b[:, at] - before.b[:, at])
                rows.append(after.a[at] - before.a[at])
            b[:, directions] += self._vote(torch.stack(columns))
            a[directions] += self._vote(torch.stack(rows))
        return Factors(b, a)

    def _vote(self, votes: Tensor) -> Tensor:
        """From (clients, …) to (…)."""
        if len(votes) < VOTES:
            none = votes.new_zeros(VOTES - len(votes), *votes.shape[1:])
            votes = torch.cat([votes, none])
        count = len(votes)
        most = (count - 1) // 2
        left_out = most if self._trimmed is None else min(most, math.ceil(self._trimmed * count))
        return votes.sort(dim=0).values[left_out : count - left_out].mean(dim=0)


def usual(lengths: Sequence[float]) -> float:
    """The median length; 0 of none."""
    return median(lengths) if lengths else 0.0
