"""Re-factorisation of what another merge gave."""

from collections.abc import Callable

from rankfit.adapters.merge import Merge, Update
from rankfit.adapters.product import refactor
from rankfit.adapters.state import Adapter, Factors


class Refactored(Merge):
    """Another merge, then each product balanced: B = U√S, A = √S·Vᵀ (HRALoRA, CCGrid 2026).

    The product is untouched and its directions are ordered, so that a low-rank client gets the
    strongest. See :func:`rankfit.adapters.product.refactor` for weak and dead directions.
    """

    aligned = False

    def __init__(
        self, reference: Adapter, seed: int, *, inner: Callable[[Adapter, int], Merge]
    ) -> None:
        super().__init__(reference, seed)
        self._inner = inner(reference, seed)

    def _add_factors(self, update: Update) -> None:
        self._inner.add(update)

    def finish(self) -> Adapter:
        """Return the inner merge's result, re-factorised."""
        self._merged = self._inner.finish()
        return super().finish()

    def residual(self) -> Adapter | None:
        """Of the inner merge."""
        return self._inner.residual()

    def _finish_module(self, module: str) -> Factors:
        own = self._merged.factors[module]
        total = self._product_sum(module)
        total.add(own, 1.0)
        return refactor(total.spectrum(own.rank), own.rank, self._generator(module))
