"""Starts: what a client is given to train from, and what it is given beside that, frozen."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.product_merges import join
from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.estimator.plan import Plan


@dataclass(frozen=True)
class Share:
    """What one client gets in one round.

    Attributes
    ----------
    given : Adapter
        The trainable part, at the ranks of the plan; its scale is the one of the forward pass.
    frozen : Adapter or None
        Directions beside it that the client sees but does not train.
    indices : Mapping[str, Tensor]
        By module, which directions of the global adapter were given (absent = the leading ones).
    """

    given: Adapter
    frozen: Adapter | None = None
    indices: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def travels(self) -> Adapter:
        """All that is sent: in each module the trainable directions, then the frozen ones."""
        return join(self.given, self.frozen)


class Start(ABC):
    """Cuts a client's share from the global state."""

    #: Whether what the merge folds into the base travels to the clients as a frozen adapter.
    folds = False
    #: Whether ``method.remainder`` can give the other directions along.
    takes_remainder = True
    #: Whether they come along without being asked for, where that costs no trained rank.
    brings_remainder = False
    #: Whether clients with the same ranks get different shares.
    draws = False

    @abstractmethod
    def share(self, sent: Adapter, folded: Adapter | None, plan: Plan, seed: int) -> Share:
        """Cut one client's share.

        Parameters
        ----------
        sent : Adapter
            The global adapter, as it arrives (after the wire type's rounding).
        folded : Adapter or None
            What earlier rounds folded into the base.
        plan : Plan
            Ranks, and whether there is a remainder.
        seed : int
            Of this client in this round.
        """

    def check(self, method: str, settings: RunSettings) -> None:
        """Refuse settings that the start cannot work with.

        Raises
        ------
        ConfigError
            For a remainder where the place of the second adapter is taken, or the scale is another.
        """
        if settings.method.remainder and not self.takes_remainder:
            raise ConfigError(f"method.remainder cannot be used with {method}; set it to false")


class Leading(Start):
    """The first directions; with ``method.remainder`` all others come along, frozen."""

    def share(self, sent: Adapter, folded: Adapter | None, plan: Plan, seed: int) -> Share:
        """See the base class."""
        return Share(sent.cut(plan.ranks), sent.rest(plan.ranks) if plan.remainder_rank else None)


class LeadingWithRemainder(Leading):
    """The first directions, and all others along, frozen, wherever that costs no trained rank.

    What a weak client cannot train it still sees, so that it does not learn it once more.
    """

    brings_remainder = True


class LeadingOnFolded(Start):
    """The first directions, over the base with all that was folded into it (FLoRA, FedEx-LoRA).

    The folded part is sent whole, as a frozen second adapter: a client may have missed any number
    of rounds, and a quantised base cannot be changed in place.
    """

    folds = True
    takes_remainder = False

    def share(self, sent: Adapter, folded: Adapter | None, plan: Plan, seed: int) -> Share:
        """See the base class."""
        return Share(sent.cut(plan.ranks), folded)


class Drawn(Start):
    """FSLoRA: client i draws I of R directions, |I| = k_i, uniformly: B[:, I], A[I, :].

    The sketch is S_i = (R/k_i)·diag(1 on I), so that E[S_i] = 1; R/k_i goes into the forward scale
    (arXiv:2501.19389). One draw serves A and B of all modules.
    """

    takes_remainder = False
    draws = True

    def share(self, sent: Adapter, folded: Adapter | None, plan: Plan, seed: int) -> Share:
        """See the base class."""
        generator = torch.Generator().manual_seed(seed)
        largest = max(own.rank for own in sent.factors.values())
        order = torch.randperm(largest, generator=generator)
        factors, indices, ratios = {}, {}, set()
        for module, rank in plan.ranks.items():
            own = sent.factors[module]
            drawn = order[order < own.rank][:rank].sort().values  # (rank,)
            indices[module] = drawn
            factors[module] = Factors(own.b[:, drawn].contiguous(), own.a[drawn].contiguous())
            ratios.add(own.rank / rank)
        if len(ratios) != 1:
            raise ValueError(f"a sketch needs one ratio R/k in all modules, got {sorted(ratios)}")
        given = Adapter(factors, sent.scale * ratios.pop(), dict(sent.head))
        return Share(given, None, indices)
