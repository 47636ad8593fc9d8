"""An adapter as a value: factors by module, head tensors by name, and one scale."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfit.adapters import names


@dataclass(frozen=True)
class Factors:
    """The pair whose product, times the scale, is added to a weight of shape (d, k).

    Attributes
    ----------
    b : Tensor
        (d, r).
    a : Tensor
        (r, k).
    """

    b: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        if self.b.dim() != 2 or self.a.dim() != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ValueError(
                f"factors B {tuple(self.b.shape)} and A {tuple(self.a.shape)} do not multiply; "
                "expected (d, r) and (r, k)"
            )

    @property
    def rank(self) -> int:
        """Number of columns of B and rows of A."""
        return self.a.shape[0]

    def product(self) -> Tensor:
        """B·A, of shape (d, k)."""
        return self.b @ self.a

    def weighted(self, values: Tensor) -> "Factors":
        """B·diag(values)·A: each direction times its own number, values (r,)."""
        return Factors(self.b * values.to(self.b.dtype), self.a)

    def cut(self, start: int, stop: int) -> "Factors":
        """Directions ``start`` to ``stop`` − 1 as factors of their own (copies)."""
        return Factors(self.b[:, start:stop].contiguous(), self.a[start:stop].contiguous())


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of any rank per module, with the head that is trained beside it.

    Attributes
    ----------
    factors : Mapping[str, Factors]
        By module name of the base model.
    scale : float
        Multiplier of every product (alpha / r), the same for all clients.
    head : Mapping[str, Tensor]
        Tensors that are trained whole, by their name in the base model.
    """

    factors: Mapping[str, Factors]
    scale: float
    head: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module."""
        return {module: factors.rank for module, factors in self.factors.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors under PEFT's names."""
        state = {}
        for module, factors in self.factors.items():
            state[names.a_name(module)] = factors.a
            state[names.b_name(module)] = factors.b
        return state | {names.head_name(name): tensor for name, tensor in self.head.items()}

    def moving(self, trainable: names.Trainable) -> dict[str, Tensor]:
        """The tensors that a client trains and returns: the factors that move, and the head."""
        return {n: t for n, t in self.state_dict().items() if names.moves_with(n, trainable)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], scale: float) -> "Adapter":
        """Inverse of :meth:`state_dict`.

        Raises
        ------
        ValueError
            For a foreign name, a module with one factor only, or factors that do not multiply.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        head = {}
        for name, tensor in state.items():
            owner, part = names.parse(name)
            if part == "head":
                head[owner] = tensor
            else:
                parts.setdefault(owner, {})[part] = tensor
        for module, pair in parts.items():
            if len(pair) != 2:
                raise ValueError(f"module {module!r} has factor {''.join(pair)!r} only; needs both")
        factors = {module: Factors(pair["b"], pair["a"]) for module, pair in parts.items()}
        return cls(factors, scale, head)

    def cut(self, ranks: Mapping[str, int]) -> "Adapter":
        """The first ``ranks[module]`` directions of each module; the head stays whole.

        Modules that are absent from ``ranks``, or at rank 0, are left out.

        Raises
        ------
        ValueError
            If a rank is larger than the adapter's, or a module is not adapted.
        """
        for module, rank in ranks.items():
            have = self.factors[module].rank if module in self.factors else 0
            if rank > have:
                raise ValueError(
                    f"module {module!r}: rank {rank} asked of an adapter of rank {have}"
                )
        factors = {
            module: self.factors[module].cut(0, rank) for module, rank in ranks.items() if rank > 0
        }
        return Adapter(factors, self.scale, dict(self.head))

    def rest(self, ranks: Mapping[str, int]) -> "Adapter":
        """What :meth:`cut` leaves behind: the directions from ``ranks[module]`` on, no head."""
        factors = {
            module: own.cut(ranks.get(module, 0), own.rank)
            for module, own in self.factors.items()
            if ranks.get(module, 0) < own.rank
        }
        return Adapter(factors, self.scale)

    def with_row_norm(self, norm: float) -> "Adapter":
        """The same products, from rows of A of one norm; B carries the strength of each direction.

        Parameters
        ----------
        norm : float
            Euclidean norm of every row of A; rows of zeros stay.
        """
        factors = {}
        for module, own in self.factors.items():
            norms = own.a.norm(dim=1)  # (r,)
            ratio = torch.where(norms > 0, norm / norms, torch.ones_like(norms))
            factors[module] = Factors(own.b / ratio, own.a * ratio[:, None])
        return Adapter(factors, self.scale, dict(self.head))

    def parameters(self) -> int:
        """Number of values, head included."""
        return sum(tensor.numel() for tensor in self.state_dict().values())


def initial(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    scale: float,
    head: Mapping[str, Tensor],
    seed: int,
) -> Adapter:
    """The adapter before training: B zero, A uniform in ±1/√k (PEFT's Kaiming start, a = √5).

    Parameters
    ----------
    shapes : Mapping[str, tuple[int, int]]
        (d, k) of each adapted weight. The rank of a module is at most min(d, k).
    rank : int
        Rank R of every module.
    scale : float
        Multiplier of the products.
    head : Mapping[str, Tensor]
        Head tensors to start from.
    seed : int
        Modules draw from streams of their own, so adding one does not change the others.
    """
    factors = {}
    for index, (module, (d, k)) in enumerate(sorted(shapes.items())):
        generator = torch.Generator().manual_seed((seed << 20) + index)
        own = min(rank, d, k)
        factors[module] = Factors(torch.zeros(d, own), random_rows(own, k, generator))
    return Adapter(factors, scale, {name: tensor.clone() for name, tensor in head.items()})


def random_rows(rows: int, k: int, generator: torch.Generator) -> Tensor:
    """Rows of A as at the start of training, shape (rows, k)."""
    uniform = torch.rand(rows, k, generator=generator)
    return uniform.mul(2).sub(1).div(k**0.5)
