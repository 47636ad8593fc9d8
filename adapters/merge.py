"""Merging updates of different ranks into the global adapter, one by one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors, random_rows
from rankfit.adapters.lowrank import Dense, Operator, Spectrum, Stack, exact, strongest
from rankfit.adapters.threads import in_threads, one_thread

#: Row norm of A at the start of training, in expectation: √(k · 1/(3k)).
START_ROW_NORM = 3**-0.5
#: A direction is dead when its singular value is below this share of the largest.
DEAD = 1e-9
#: Stacked rank at which terms join a dense sum: enough for a product to run at full speed.
BLOCK = 512
CPU = torch.device("cpu")


class ProductSum:
    """Σ w·B·A, added term by term; memory is bounded by a few dense (d, k) matrices.

    Parameters
    ----------
    d, k : int
        Shape of the products.
    device : torch.device
        Where terms are multiplied out and decomposed; they wait, and results come, on the CPU.
    """

    def __init__(self, d: int, k: int, device: torch.device = CPU) -> None:
        self._d, self._k, self._device = d, k, device
        self._terms: list[tuple[Factors, float]] = []
        self._stacked = 0
        self._dense: Tensor | None = None

    def add(self, factors: Factors, weight: float) -> None:
        """Add ``weight · B·A``; the factors are kept and must not be changed afterwards.

        Raises
        ------
        ValueError
            If the factors are not of this sum's (d, k): nothing is ever broadcast.
        """
        shape = (factors.b.shape[0], factors.a.shape[1])
        if shape != (self._d, self._k):
            raise ValueError(f"a product of shape {shape} cannot join a sum of {self._d, self._k}")
        self._terms.append((factors, weight))
        self._stacked += factors.rank
        width = min(self._d, self._k)
        if self._stacked >= (width if self._dense is None else min(BLOCK, width)):
            with one_thread():
                self._multiply_out()

    def dense(self) -> Tensor:
        """The sum as a (d, k) matrix in float64."""
        with one_thread():
            return self._operator().dense().cpu()

    def spectrum(self, rank: int) -> Spectrum:
        """Its ``rank`` strongest directions, exactly."""
        with one_thread():
            return exact(self._operator(), min(rank, self._d, self._k)).cpu()

    def strongest(
        self,
        rank: int,
        tolerance: float,
        generator: torch.Generator,
        start: Tensor | None = None,
    ) -> Spectrum:
        """Its ``rank`` strongest directions; see :func:`rankfit.adapters.lowrank.strongest`."""
        with one_thread():
            return strongest(self._operator(), rank, tolerance, generator, start).cpu()

    def _operator(self) -> Operator:
        if self._dense is not None:
            if self._terms:
                self._multiply_out()
            return Dense(self._dense)
        return self._stack()

    def _stack(self) -> Stack:
        if not self._terms:
            none = torch.zeros(0, dtype=torch.float64)
            return Stack(torch.zeros(self._d, 0), torch.zeros(0, self._k), none).to(self._device)
        weights = [torch.full((own.rank,), w, dtype=torch.float64) for own, w in self._terms]
        return Stack(
            torch.cat([own.b for own, _ in self._terms], 1),
            torch.cat([own.a for own, _ in self._terms], 0),
            torch.cat(weights),
        ).to(self._device)

    def _multiply_out(self) -> None:
        """Turn the terms that are kept as factors into part of the dense sum."""
        stack = self._stack()
        left = stack.left * stack.weights.to(stack.left.dtype)
        if self._dense is None:
            self._dense = left @ stack.right
        else:
            self._dense.addmm_(left, stack.right)
        self._terms, self._stacked = [], 0


def refactor(spectrum: Spectrum, rank: int, generator: torch.Generator) -> Factors:
    """Best rank-``rank`` approximation as trainable factors, strongest direction first.

    With n = max(√σ, norm of a fresh row), A's row is n·v and B's column σ/n·u. A strong direction
    is balanced, a weak one keeps an A that gradients can pass, and a dead one (σ = 0) gets a fresh
    random A and B = 0: the product is untouched and the direction stays trainable. The plain
    balanced form makes both factors zero there, which has zero gradient for ever.

    Returns
    -------
    Factors
        B (d, rank) and A (rank, k) in float32.
    """
    k = spectrum.vt.shape[1]
    values = spectrum.values[:rank]
    live = int((values > DEAD * spectrum.values[:1].clamp(min=1e-30)).sum())
    values = values[:live]
    norms = values.sqrt().clamp(min=START_ROW_NORM)
    b = spectrum.u[:, :live] * (values / norms)  # (d, live)
    a = spectrum.vt[:live] * norms[:, None]  # (live, k)
    fresh = random_rows(rank - live, k, generator)
    dead = torch.zeros(b.shape[0], rank - live)
    return Factors(torch.cat([b.float(), dead], 1), torch.cat([a.float(), fresh], 0))


@dataclass(frozen=True)
class Update:
    """What one client trained.

    Attributes
    ----------
    given : Adapter
        What the client was given to start from (its trainable part).
    trained : Adapter
        The same shapes after training; factors that did not move are as given.
    weight : float
        Number of samples.
    indices : Mapping[str, Tensor]
        By module, the directions of the global adapter that were given, shape (rank,), int64; a
        module that is absent was given the leading ones.
    """

    given: Adapter
    trained: Adapter
    weight: float
    indices: Mapping[str, Tensor] = field(default_factory=dict)

    def directions(self, module: str) -> Tensor:
        """Directions of the global adapter that the module's factors stand for, (rank,) int64."""
        found = self.indices.get(module)
        return torch.arange(self.trained.factors[module].rank) if found is None else found


class Merge(ABC):
    """Adds up updates to a global adapter.

    Parameters
    ----------
    reference : Adapter
        The global adapter of this round.
    seed : int
        For directions that must be drawn anew.
    """

    #: Whether direction j of the next adapter continues direction j of this one, so that a change
    #: of the factors means something; a merge that re-factorises rotates them.
    aligned = True

    def __init__(self, reference: Adapter, seed: int) -> None:
        self.reference = reference
        self.seed = seed
        self.total = 0.0
        #: How far above the best approximation's error a merge of products may be, relative to it;
        #: 0 = exact. See :func:`rankfit.adapters.lowrank.strongest`.
        self.tolerance = 0.0
        #: Modules that are finished side by side; 0 = as many as the process may use cores.
        self.threads = 0
        #: Where products are summed and decomposed; set before the first update.
        self.device = torch.device("cpu")
        self._head = {name: torch.zeros_like(t) for name, t in reference.head.items()}

    def add(self, update: Update) -> None:
        """Add one update.

        Raises
        ------
        ValueError
            If the weight is not positive, or a shape does not fit the global adapter.
        """
        if not update.weight > 0:
            raise ValueError(f"an update of weight {update.weight} cannot be merged")
        if set(update.trained.head) != set(self._head):
            raise ValueError(
                f"head tensors {sorted(update.trained.head)} do not match {sorted(self._head)}"
            )
        for name, tensor in update.trained.head.items():
            if tensor.shape != self._head[name].shape:
                raise ValueError(f"head tensor {name!r} is {tuple(tensor.shape)}")
        for module, factors in update.trained.factors.items():
            _check_fits(module, factors, update.directions(module), self.reference)
        with one_thread():
            self._add_factors(update)
            for name, tensor in update.trained.head.items():
                self._head[name].add_(tensor, alpha=update.weight)
        self.total += update.weight

    def finish(self) -> Adapter:
        """Return the next global adapter, or the reference itself if nothing was added."""
        if self.total == 0:
            return self.reference
        head = self._finish_head()
        modules = list(self.reference.factors)
        # A GPU runs one after the other anyway, and torch's linear algebra on it must not begin in
        # two threads at once ("lazy wrapper should be called at most once").
        threads = 1 if self.device.type == "cuda" else self.threads
        done = in_threads(self._finish_module, modules, threads)
        factors = dict(zip(modules, done, strict=True))
        return Adapter(factors, self.reference.scale, head)

    def residual(self) -> Adapter | None:
        """What the next adapter leaves out and the base takes in; None = nothing (most merges).

        Asked for after :meth:`finish`.
        """
        return None

    def _finish_head(self) -> dict[str, Tensor]:
        """Give the next head: the mean."""
        return {name: tensor / self.total for name, tensor in self._head.items()}

    @abstractmethod
    def _add_factors(self, update: Update) -> None:
        """Fold the factors of a checked update in."""

    @abstractmethod
    def _finish_module(self, module: str) -> Factors:
        """Give the next global factors of one module."""

    def _product_sum(self, module: str) -> ProductSum:
        """An empty sum for the products of a module."""
        own = self.reference.factors[module]
        return ProductSum(own.b.shape[0], own.a.shape[1], self.device)

    def _generator(self, module: str) -> torch.Generator:
        index = sorted(self.reference.factors).index(module)
        return torch.Generator().manual_seed((self.seed << 20) + index)


def _check_fits(module: str, factors: Factors, directions: Tensor, reference: Adapter) -> None:
    """Refuse factors that are not a sub-adapter of the global one."""
    if module not in reference.factors:
        raise ValueError(f"module {module!r} is not part of the global adapter")
    own = reference.factors[module]
    shape = (factors.b.shape[0], factors.a.shape[1])
    if shape != (own.b.shape[0], own.a.shape[1]) or factors.rank > own.rank:
        raise ValueError(
            f"module {module!r}: product {shape} of rank {factors.rank} does not fit "
            f"{(own.b.shape[0], own.a.shape[1])} of rank {own.rank}"
        )
    if len(directions) != factors.rank or len(set(directions.tolist())) != factors.rank:
        raise ValueError(
            f"module {module!r}: rank {factors.rank} comes with directions {directions.tolist()}; "
            "expected as many, all different"
        )
    if factors.rank and not 0 <= int(directions.min()) <= int(directions.max()) < own.rank:
        raise ValueError(
            f"module {module!r}: directions {directions.tolist()} are not all below {own.rank}"
        )


class AverageFactors(Merge):
    """FedIT: Σ w·A and Σ w·B, at one rank for all. Not the mean of the products.

    Directions beyond that rank keep the global factors. What is summed is how far the factors are
    from the global ones, so that a factor that rests stays the same to the last bit.
    """

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._sums: dict[str, Factors] = {}

    def _add_factors(self, update: Update) -> None:
        if not self._sums:
            self._sums = zeros_like(update.trained)
        expected = {module: own.rank for module, own in self._sums.items()}
        if update.trained.ranks != expected:
            raise ValueError(
                f"plain averaging needs one rank of all clients, {expected}, got "
                f"{update.trained.ranks}; choose a method for mixed ranks"
            )
        for module, factors in update.trained.factors.items():
            own, rank = self.reference.factors[module], factors.rank
            self._sums[module].b.add_(factors.b - own.b[:, :rank], alpha=update.weight)
            self._sums[module].a.add_(factors.a - own.a[:rank], alpha=update.weight)

    def _finish_module(self, module: str) -> Factors:
        own = self.reference.factors[module]
        if module not in self._sums:
            return own
        mean = self._averages(module)
        b = torch.cat([mean.b, own.b[:, mean.rank :]], 1)
        a = torch.cat([mean.a, own.a[mean.rank :]], 0)
        return Factors(b, a)

    def _averages(self, module: str) -> Factors:
        total = self._sums[module]
        own, rank = self.reference.factors[module], total.rank
        return Factors(own.b[:, :rank] + total.b / self.total, own.a[:rank] + total.a / self.total)


class ZeroPadded(Merge):
    """HetLoRA: zero-padded factors, weighted per module by ‖B·A‖_F (arXiv:2401.06432)."""

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._sums = zeros_like(reference)
        self._norms = dict.fromkeys(reference.factors, 0.0)

    def _add_factors(self, update: Update) -> None:
        for module, factors in update.trained.factors.items():
            norm = float(product_norm(factors))
            self._norms[module] += norm
            scatter(self._sums[module], update.directions(module), factors, norm)

    def _finish_module(self, module: str) -> Factors:
        if self._norms[module] == 0:
            return self.reference.factors[module]
        total = self._sums[module]
        return Factors(total.b / self._norms[module], total.a / self._norms[module])


class PaddedChange(Merge):
    """Changes of the factors, each at its own directions, averaged over all clients of the round.

    Alternation: one factor is trained, and this is exact at mixed ranks without an SVD: with A the
    same for all, Σ w·(B − B⁰)·A[:r] is the padded mean change of B times A (and the same with the
    letters exchanged). FSLoRA (arXiv:2501.19389): both factors move, at directions that were
    drawn; a direction that a client did not draw counts as a change of zero.
    """

    def __init__(self, reference: Adapter, seed: int) -> None:
        super().__init__(reference, seed)
        self._sums = zeros_like(reference)

    def _add_factors(self, update: Update) -> None:
        for module, factors in update.trained.factors.items():
            given = update.given.factors[module]
            change = Factors(factors.b - given.b, factors.a - given.a)
            scatter(self._sums[module], update.directions(module), change, update.weight)

    def _finish_module(self, module: str) -> Factors:
        own, total = self.reference.factors[module], self._sums[module]
        return Factors(own.b + total.b / self.total, own.a + total.a / self.total)


def product_norm(factors: Factors) -> Tensor:
    """‖B·A‖_F without building the product: √ tr((BᵀB)(AAᵀ))."""
    b, a = factors.b.double(), factors.a.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def scatter(total: Factors, directions: Tensor, factors: Factors, weight: float) -> None:
    """Add weighted factors to a sum at some of its directions, in place."""
    total.b.index_add_(1, directions, factors.b, alpha=weight)
    total.a.index_add_(0, directions, factors.a, alpha=weight)


def zeros_like(adapter: Adapter) -> dict[str, Factors]:
    """Factors of zeros in the shapes of an adapter's."""
    return {
        module: Factors(torch.zeros_like(own.b), torch.zeros_like(own.a))
        for module, own in adapter.factors.items()
    }
