"""From the merge to the next global adapter: server optimizer, folding, moving average."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import Merge, ProductSum, refactor
from rankfit.adapters.product_merges import fold, join
from rankfit.adapters.threads import one_thread
from rankfit.configs.settings import ConfigError, RunSettings, Server, derive

Tensors = dict[str, Tensor]

#: Rank of the moving average, as a multiple of the global rank, before its smallest directions go.
AVERAGE_RANKS = 4


class ServerOptimizer:
    """FedOpt (arXiv:2003.00295): Δ = merged − old is taken as the negative of a gradient.

    sgd: x + η·Δ. momentum: m ← β·m + Δ, x + η·m. adam: m ← β·m + (1 − β)·Δ,
    v ← β₂·v + (1 − β₂)·Δ², x + η·m/(√v + ε).
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.first: Tensors = {}
        self.second: Tensors = {}

    def step(self, old: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> Tensors:
        """The next value of each tensor."""
        rule: Callable[[str, Tensor], Tensor] = {
            "sgd": lambda name, change: change,
            "momentum": self._momentum,
            "adam": self._adam,
        }[self._server.optimizer]
        rate = self._server.learning_rate
        return {name: old[name] + rate * rule(name, merged[name] - old[name]) for name in old}

    def _momentum(self, name: str, change: Tensor) -> Tensor:
        before = self.first.get(name, torch.zeros_like(change))
        self.first[name] = self._server.momentum * before + change
        return self.first[name]

    def _adam(self, name: str, change: Tensor) -> Tensor:
        beta, beta2 = self._server.momentum, self._server.second_momentum
        first = self.first.get(name, torch.zeros_like(change))
        second = self.second.get(name, torch.zeros_like(change))
        self.first[name] = beta * first + (1 - beta) * change
        self.second[name] = beta2 * second + (1 - beta2) * change.square()
        return self.first[name] / (self.second[name].sqrt() + self._server.epsilon)


class ServerUpdate:
    """Turns each round's merge into the next global adapter.

    Parameters
    ----------
    settings : RunSettings
        The run; ``server.optimizer`` and ``server.average`` say what is done.
    folds : bool
        Whether the method folds what it learns into the base.

    Raises
    ------
    ConfigError
        For a server optimizer with a method that folds: its adapter starts anew each round.
    """

    def __init__(self, settings: RunSettings, folds: bool) -> None:
        if folds and settings.server.optimizer != "none":
            raise ConfigError(
                f"server.optimizer {settings.server.optimizer!r} cannot be used with "
                f"{settings.method.name}, which folds each round into the base; set it to 'none'"
            )
        self._settings = settings
        self._folds = folds
        self._optimizer = ServerOptimizer(settings.server)
        #: What earlier rounds folded into the base.
        self.folded: Adapter | None = None
        #: What the last merge gave, before the server optimizer.
        self.merged: Adapter | None = None
        self._average: Adapter | None = None
        self._steps = 0

    def __call__(self, merge: Merge) -> Adapter:
        """The next global adapter; nothing changes in a round without updates."""
        with one_thread():
            return self._next(merge)

    def _next(self, merge: Merge) -> Adapter:
        merged = self.merged = merge.finish()
        self._steps += 1
        if merge.total > 0:
            self.folded = fold(self.folded, merge.residual())
            merged = self._optimize(merge.reference, merged, merge.aligned)
        if self._settings.server.average:
            self._average = self._averaged(join(merged, self.folded))
        return merged

    def snapshot(self) -> tuple[object, ...]:
        """All that a call changes, for :meth:`rewind`: no tensor is changed in place."""
        own = self._optimizer
        return (
            dict(own.first), dict(own.second), self.folded, self.merged, self._average, self._steps,
        )  # fmt: skip

    def rewind(self, snapshot: tuple[Any, ...]) -> None:
        """Forget what came after a :meth:`snapshot`."""
        self._optimizer.first, self._optimizer.second, *rest = snapshot
        self.folded, self.merged, self._average, self._steps = rest

    def exported(self, adapter: Adapter) -> Adapter:
        """What is evaluated and saved: the moving average, or the adapter, with what was folded."""
        if self._average is None:
            return join(adapter, self.folded)
        if self._folds:
            return self._average
        ranks = adapter.ranks
        factors = {m: self._cut(own, 1.0, ranks[m]) for m, own in self._average.factors.items()}
        return Adapter(factors, adapter.scale, self._average.head)

    def state(self) -> Tensors:
        """Tensors for the checkpoint."""
        kept = {"first": self._optimizer.first, "second": self._optimizer.second}
        kept |= {"folded": {} if self.folded is None else self.folded.state_dict()}
        kept |= {"average": {} if self._average is None else self._average.state_dict()}
        return {f"{part}/{name}": t for part, own in kept.items() for name, t in own.items()}

    def restore(self, tensors: Mapping[str, Tensor], server_round: int) -> None:
        """Take over the state of an interrupted run."""

        def part(name: str) -> Tensors:
            return {
                key.removeprefix(f"{name}/"): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}/")
            }

        scale = self._settings.lora.scale
        self._optimizer.first, self._optimizer.second = part("first"), part("second")
        folded, average = part("folded"), part("average")
        self.folded = Adapter.from_state_dict(folded, scale) if folded else None
        self._average = Adapter.from_state_dict(average, scale) if average else None
        self._steps = server_round

    def _optimize(self, old: Adapter, merged: Adapter, aligned: bool) -> Adapter:
        """One step on the factors where they keep their directions, else on the products."""
        if self._settings.server.optimizer == "none":
            return merged
        if aligned:
            moved = self._optimizer.step(old.state_dict(), merged.state_dict())
            return Adapter.from_state_dict(moved, old.scale)
        moved = self._optimizer.step(_products(old), _products(merged))
        factors = {}
        for module, own in old.factors.items():
            total = _dense_sum(moved[f"product/{module}"])
            factors[module] = refactor(total.spectrum(own.rank), own.rank, self._generator())
        head = {name: moved[f"head/{name}"] for name in old.head}
        return Adapter(factors, old.scale, head)

    def _averaged(self, current: Adapter) -> Adapter:
        """E ← β·E + (1 − β)·X on products and head; the first average is the first adapter."""
        if self._average is None:
            return current
        beta, before = self._settings.server.average, self._average
        factors = {}
        for module, own in current.factors.items():
            rank = min(own.b.shape[0], own.a.shape[1])
            if not self._folds:
                rank = min(rank, AVERAGE_RANKS * self._settings.lora.rank)
            factors[module] = self._cut(own, 1 - beta, rank, before.factors[module], beta)
        head = {n: beta * before.head[n] + (1 - beta) * t for n, t in current.head.items()}
        return Adapter(factors, current.scale, head)

    def _cut(
        self,
        own: Factors,
        weight: float,
        rank: int,
        other: Factors | None = None,
        other_weight: float = 0.0,
    ) -> Factors:
        """Best approximation of a weighted sum of one or two products."""
        total = ProductSum(own.b.shape[0], own.a.shape[1])
        total.add(own, weight)
        if other is not None:
            total.add(other, other_weight)
        return refactor(total.spectrum(rank), rank, self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(
            derive(self._settings.run.seed, "advance", self._steps)
        )


def _products(adapter: Adapter) -> Tensors:
    products = {
        f"product/{module}": own.b.double() @ own.a.double()
        for module, own in adapter.factors.items()
    }
    return products | {f"head/{name}": tensor for name, tensor in adapter.head.items()}


def _dense_sum(product: Tensor) -> ProductSum:
    d, k = product.shape
    total = ProductSum(d, k)
    identity = torch.eye(min(d, k), dtype=product.dtype)
    total.add(Factors(product, identity) if k <= d else Factors(identity, product), 1.0)
    return total
