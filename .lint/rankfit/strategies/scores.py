"""Importance scores that clients measure on their own data, averaged by the server."""

from collections.abc import Mapping

#: Metrics of this name, with a module behind it, are scores.
PREFIX = "score."


class ScoreBook:
    """Sample-weighted means of the scores of one round; a module that nobody measured is absent."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def see(self, metrics: Mapping[str, int | float]) -> None:
        """Add what one client measured."""
        weight = float(metrics.get("num-examples", 0))
        for name, value in metrics.items():
            if name.startswith(PREFIX):
                module = name.removeprefix(PREFIX)
                self._sums[module] = self._sums.get(module, 0.0) + weight * float(value)
                self._weights[module] = self._weights.get(module, 0.0) + weight

    def means(self) -> dict[str, float]:
        """Mean of each module that was measured."""
        return {module: total / self._weights[module] for module, total in self._sums.items()}

    @staticmethod
    def without(metrics: Mapping[str, int | float]) -> dict[str, int | float]:
        """All other metrics."""
        return {name: value for name, value in metrics.items() if not name.startswith(PREFIX)}
