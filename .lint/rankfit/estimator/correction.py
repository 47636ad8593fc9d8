"""What updates teach: bytes that a kind of device takes above its estimate."""

import logging
from collections.abc import Mapping

from rankfit.estimator.report import DeviceReport

log = logging.getLogger(__name__)

#: Corrections are whole multiples of it, and an excess of less than one is none: what a step takes
#: varies by some hundred bytes of counters, and two runs of one seed must make the same plans.
GRAIN = 16 * 1024


def kind_of(report: DeviceReport) -> str:
    """Kind of device whose errors are alike: accelerator, product, compute capability."""
    return " ".join((report.accelerator, report.name, report.compute_capability)).strip()


class Corrections:
    """Largest excess of a measured peak over the estimate, by kind of device.

    Only an excess is kept: a peak below the estimate means that the data were shorter than the
    largest batch, not that the device needs less.
    """

    def __init__(self) -> None:
        self._excess: dict[str, int] = {}

    def extra_bytes(self, report: DeviceReport) -> int:
        """Bytes to keep free on a device beside its estimate."""
        return self._excess.get(kind_of(report), 0)

    def learn(self, report: DeviceReport, expected_bytes: int, measured_bytes: int) -> None:
        """Take in the measured peak of one update that trained its whole plan."""
        excess, kind = measured_bytes - expected_bytes, kind_of(report)
        excess = -(-excess // GRAIN) * GRAIN if excess >= GRAIN else 0
        if excess > self._excess.get(kind, 0):
            self._excess[kind] = excess
            log.info(
                "%s takes up to %.2f MiB above its estimate, which is kept free from now on",
                kind, excess / 2**20,
            )  # fmt: skip

    def state(self) -> dict[str, int]:
        """What was learnt, for the checkpoint."""
        return dict(self._excess)

    def restore(self, state: Mapping[str, int]) -> None:
        """Take over what an interrupted run had learnt."""
        self._excess = {kind: int(value) for kind, value in state.items()}
