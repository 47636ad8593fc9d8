"""The best round so far by one figure, and when a run stops because no better one comes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rankfit.configs.settings import Best, ConfigError


@dataclass(frozen=True)
class BestRound:
    """The best round so far; it lies in every checkpoint, so that a resumed run chooses the same.

    Attributes
    ----------
    round : int
        Its number; 0 = none was measured yet. The start of a run is no round.
    value : float
        Its figure.
    waited : int
        Evaluations since then without a better one.
    """

    round: int = 0
    value: float = 0.0
    waited: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "BestRound":
        """Read back what :meth:`state` made; {} = none was measured yet."""
        return cls(**state)

    def state(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    def after(self, number: int, figures: Mapping[str, float], rules: Best) -> "BestRound":
        """The best round when one more was measured; a figure that is missing is no better one."""
        value = figures.get(rules.metric)
        if value is None or (self.round and not self._beaten(value, rules)):
            return replace(self, waited=self.waited + 1)
        return BestRound(number, value)

    def stops(self, rules: Best) -> bool:
        """Whether the patience is at an end."""
        return 0 < rules.patience <= self.waited

    def _beaten(self, value: float, rules: Best) -> bool:
        return value < self.value if rules.least else value > self.value


def where(rules: Best) -> str:
    """On which data the figure was measured that chooses."""
    return "the holdout" if rules.holdout else "the evaluation's own data"


def check_metric(rules: Best, figures: Mapping[str, float]) -> None:
    """Refuse a metric that an evaluation of this task does not give.

    Raises
    ------
    ConfigError
        With the names of those that it gives.
    """
    if rules.metric not in figures:
        raise ConfigError(
            f"best.metric {rules.metric!r}: an evaluation of this task gives "
            f"{', '.join(sorted(figures))}"
        )
