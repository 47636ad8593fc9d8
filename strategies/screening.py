"""Which of a round's updates are merged, and how much each of them weighs.

A client's claims are measured against those of the others: its change against the median length of
the round's changes (factors and head apart), its samples against what it said first and against the
median of the round; samples that the server knows a client to have (its part of a data set that the
server divides) are no claim, and count in full. Medians need all updates of a round, so these wait
until the round closes, but no more than ``server.max-waiting-updates`` at a time: beyond it,
updates are judged by those that came so far, and memory stays bounded. A round of fewer than
:data:`FEW` updates has no majority; the lengths of the last merged ones (of the same factors) are
asked as well. In a first round of one or two updates nobody can be asked: then only the absolute
limits hold.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rankfit.adapters.merge import Update
from rankfit.adapters.names import Trainable
from rankfit.adapters.robust import (
    Length,
    agreeing,
    agreement,
    geometric_median,
    krum,
    length,
    shortened,
    usual,
)
from rankfit.configs.settings import Server
from rankfit.strategies.replies import Refused

log = logging.getLogger(__name__)

#: Updates that make a median of their own.
FEW = 5
#: Merged lengths that are remembered for rounds of fewer.
REMEMBERED = 16
#: What comes of an update: the update as it is merged, or why it is not.
Judged = Update | Refused


class Screening:
    """Judges updates, over the rounds of a run.

    Parameters
    ----------
    server : Server
        Its limits and its robust merge.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._known: Mapping[str, int] = {}
        self._most = 0
        #: Samples of each client, as it said first.
        self.samples: dict[str, float] = {}
        self._lengths: dict[str, list[Length]] = {}
        self._seen: list[Length] = []
        self._weights: list[float] = []

    @property
    def needs_all(self) -> bool:
        """Whether the robust merge chooses among all updates of a round."""
        return self._server.robust in ("geometric-median", "krum", "multi-krum", "cosine")

    def know(self, samples: Mapping[str, int], most: int) -> None:
        """Bound what clients can claim to have.

        Parameters
        ----------
        samples : Mapping[str, int]
            Samples that the server knows a client to have, by its name.
        most : int
            Samples that no client can have more of (0 = not known).
        """
        self._known, self._most = samples, most

    def open(self) -> None:
        """Begin a round."""
        self._seen, self._weights = [], []

    def weigh(self, client: str, update: Update, reported: int) -> Update:
        """The update at the number of samples that is believed.

        Parameters
        ----------
        reported : int
            Samples in the client's device report (−1 = not counted).

        Raises
        ------
        Refused
            If the number has changed, and ``server.sample-changes`` is ``refuse``.
        """
        claimed = update.weight
        bound = self._known.get(client, self._most)
        believed = min(claimed, bound) if bound else claimed
        if believed < claimed:
            log.warning("client %s claims %g samples and has %d at most", client, claimed, bound)
        first = self.samples.setdefault(client, float(reported) if reported > 0 else believed)
        if claimed != first and self._server.sample_changes == "refuse":
            raise Refused("samples changed", f"{claimed:g} samples; it said {first:g} before")
        if self._server.sample_changes == "cap":
            believed = min(believed, first)
        return replace(update, weight=believed)

    def judge(
        self, clients: Sequence[str], updates: Sequence[Update], trainable: Trainable
    ) -> list[Judged]:
        """What comes of each of these updates of a round, in their order.

        Parameters
        ----------
        clients : Sequence[str]
            Whose update each of them is.
        trainable : {"both", "a", "b"}
            Which factors moved: changes of other ones are of other lengths.
        """
        lengths = [length(update.given, update.trained) for update in updates]
        self._seen += lengths
        asked = list(self._seen)
        if len(asked) < FEW:
            asked += self._lengths.get(trainable, [])
        judged = self._without_strays(
            clients,
            updates,
            [self._limited(u, own, asked) for u, own in zip(updates, lengths, strict=True)],
        )
        kept = {place: one for place, one in enumerate(judged) if isinstance(one, Update)}
        self._remember(
            trainable,
            [
                lengths[place]
                if one.trained is updates[place].trained
                else length(one.given, one.trained)
                for place, one in kept.items()
            ],
        )
        sure = [clients[place] in self._known for place in kept]
        for place, one in zip(kept, self._weighted([*kept.values()], sure), strict=True):
            judged[place] = one
        return judged

    def state(self) -> dict[str, Any]:
        """What was learned, for the checkpoint."""
        lengths = {
            trainable: [[own.factors, own.head] for own in found]
            for trainable, found in self._lengths.items()
        }
        return {"samples": dict(self.samples), "lengths": lengths}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what an interrupted run had learned."""
        self.samples = {client: float(count) for client, count in state.get("samples", {}).items()}
        self._lengths = {
            trainable: [Length(*map(float, own)) for own in found]
            for trainable, found in state.get("lengths", {}).items()
        }

    def _limited(self, update: Update, own: Length, asked: Sequence[Length]) -> Judged:
        """An update whose change is not too long: shortened to the median of the round if it is."""
        most = self._server.max_update_norm
        if most and max(own.factors, own.head) > most:
            return Refused(
                "too long a change",
                f"change of norm {max(own.factors, own.head):.3g} is above "
                f"server.max-update-norm {most:g}",
            )
        if len(asked) < 3:
            return update
        middle = Length(usual([o.factors for o in asked]), usual([o.head for o in asked]))
        if self._server.robust == "norm-clipping":
            return shortened(update, middle.factors, middle.head)
        limit, allowed = self._server.norm_limit, own
        for part in ("factors", "head"):
            mine, median = getattr(own, part), getattr(middle, part)
            if limit and median > 0 and mine > limit * median:
                allowed = replace(allowed, **{part: median})
        if allowed is own:
            return update
        return shortened(update, allowed.factors, allowed.head)

    def _without_strays(
        self, clients: Sequence[str], updates: Sequence[Update], limited: Sequence[Judged]
    ) -> list[Judged]:
        """Shortened changes stay where they point as those of the others do, and are else refused.

        One that does is a client with more steps or another rate; one that does not would harm at
        any length.
        """
        usual_ones = [p for p, own in enumerate(updates) if limited[p] is own]
        found = list(limited)
        if len(usual_ones) == len(updates) or self._server.robust == "norm-clipping":
            return found
        pointing = agreement(updates)
        least = usual([pointing[p] for p in usual_ones]) / 2 if len(usual_ones) > 2 else math.inf
        for place, one in enumerate(limited):
            if place in usual_ones or isinstance(one, Refused):
                continue
            limit = self._server.norm_limit
            if pointing[place] < least:
                found[place] = Refused(
                    "too long a change",
                    f"its change is longer than {limit:g} medians of the round "
                    "(server.norm-limit), and points elsewhere than those of the others",
                )
            else:
                log.warning(
                    "client %s: its change is longer than %g medians of the round; it points as "
                    "those of the others do, and is shortened to the median",
                    clients[place], limit,
                )  # fmt: skip
        return found

    def _weighted(self, updates: Sequence[Update], known: Sequence[bool]) -> list[Judged]:
        """Updates at their weights: those that the robust merge chooses, capped, or as it says."""
        if not updates:
            return []
        chosen = self._chosen(updates)
        left_out = Refused("not chosen", f"server.robust={self._server.robust} chose others")
        judged: list[Judged] = [left_out for _ in updates]
        self._weights += [updates[place].weight for place in chosen]
        most = largest_weight(self._weights, self._server.max_weight_share)
        capped = [
            updates[p] if known[p] else replace(updates[p], weight=min(updates[p].weight, most))
            for p in chosen
        ]
        if self._server.robust == "geometric-median" and len(updates) > 2:
            weights = geometric_median(capped)
            capped = [
                replace(u, weight=max(w, 1e-12)) for u, w in zip(capped, weights, strict=True)
            ]
        for place, update in zip(chosen, capped, strict=True):
            judged[place] = update
        return judged

    def _chosen(self, updates: Sequence[Update]) -> list[int]:
        """Places of the updates that are merged, in their order."""
        robust = self._server.robust
        if robust == "cosine":
            return agreeing(updates)
        if robust not in ("krum", "multi-krum"):
            return list(range(len(updates)))
        hostile = -int(-self._server.robust_share * len(updates) // 1)
        order = krum(updates, hostile)
        return sorted(order[: 1 if robust == "krum" else len(order) - hostile])

    def _remember(self, trainable: Trainable, lengths: Sequence[Length]) -> None:
        self._lengths[trainable] = [*self._lengths.get(trainable, []), *lengths][-REMEMBERED:]


def largest_weight(weights: Sequence[float], share: float) -> float:
    """The weight at which one of a round's clients has a share of it, whatever the others claim.

    No other counts for more than the median here, so that several who claim much do not lift each
    other. A round of two has no majority: two of n shares are always allowed.
    """
    share = max(share, 2 / len(weights)) if weights else 1.0
    if share >= 1:
        return math.inf
    middle = usual(weights)
    others = sum(min(own, middle) for own in weights) - middle
    return share / (1 - share) * others
