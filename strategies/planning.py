"""Plans for a fleet: what the estimator allows each device, and what the method makes of it."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rankfit.configs.settings import ConfigError
from rankfit.estimator.fit import Estimator, NothingFits
from rankfit.estimator.plan import Plan
from rankfit.estimator.report import DeviceReport
from rankfit.strategies.method import Method

log = logging.getLogger(__name__)

#: After out of memory, a client is planned with this share of what the failed plan was to take.
AFTER_FAILURE = 0.95


class Planner:
    """Keeps the plans of a fleet up to date.

    Parameters
    ----------
    method : Method
        Its allocation turns the largest ranks into the ranks that clients get.
    estimator : Estimator
        Gives a device the largest rank that fits.
    """

    def __init__(self, method: Method, estimator: Estimator) -> None:
        self._method = method
        self._estimator = estimator
        #: Bytes that a client is trusted with after it ran out of memory, by its name.
        self._ceilings: dict[str, int] = {}
        #: Why a client gets no plan.
        self.refused: dict[str, str] = {}
        self._fits: dict[DeviceReport, Plan | NothingFits] = {}

    def plan_fleet(self, reports: Mapping[str, DeviceReport]) -> dict[str, Plan]:
        """Plan for every device that can train; the others are in :attr:`refused`.

        Raises
        ------
        ConfigError
            If there are devices, and none of them can train.
        """
        limited = {name: self._limit(report) for name, report in reports.items()}
        fitted: dict[str, Plan] = {}
        self.refused = {}
        for client, report in limited.items():
            fit = self._fit(report)
            if isinstance(fit, NothingFits):
                self.refused[client] = fit.reason
            else:
                fitted[client] = fit
        if reports and not fitted:
            listed = "; ".join(f"{client} {reason}" for client, reason in self.refused.items())
            raise ConfigError(f"no device can train even plan.min-rank: {listed}")
        ranks = self._method.allocate({client: plan.rank for client, plan in fitted.items()})
        return {
            client: self._at(limited[client], fitted[client], ranks[client])
            for client in fitted
            if ranks[client] > 0
        }

    def ran_out(self, client: str, plan: Plan) -> None:
        """Plan smaller for a client that ran out of memory at a plan."""
        ceiling = int(AFTER_FAILURE * plan.peak_bytes)
        self._ceilings[client] = min(ceiling, self._ceilings.get(client, ceiling))
        log.info("client %s is planned with %.1f MiB from now on", client, ceiling / 2**20)

    def state(self) -> dict[str, Any]:
        """What was learnt about the fleet, for the checkpoint."""
        return {"ceilings": dict(self._ceilings)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what an interrupted run had learnt."""
        self._ceilings = {client: int(value) for client, value in state.get("ceilings", {}).items()}

    def _limit(self, report: DeviceReport) -> DeviceReport:
        ceiling = self._ceilings.get(report.client)
        if ceiling is None or ceiling >= report.free_bytes:
            return report
        return replace(report, free_bytes=ceiling)

    def _fit(self, report: DeviceReport) -> Plan | NothingFits:
        # Devices of one kind share a plan: ten thousand of them cost as much as one.
        kind = replace(report, client="", uuid="", samples=-1)
        if kind not in self._fits:
            fit = self._estimator.fit(kind)
            self._fits[kind] = fit if isinstance(fit, NothingFits) else fit.plan
        return self._fits[kind]

    def _at(self, report: DeviceReport, plan: Plan, rank: int) -> Plan:
        return plan if rank == plan.rank else self._estimator.lower(report, plan, rank)
