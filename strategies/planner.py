"""Plans for a fleet: what the estimator allows each device, and what the method makes of it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from statistics import median_low
from typing import Any

from rankfit.adapters.names import Trainable
from rankfit.configs.protocol import Metric
from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.estimator.calibration import Corrections
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.plan import Plan
from rankfit.estimator.plan_search import Estimator, NothingFits
from rankfit.estimator.round_time import Throughput
from rankfit.strategies.allocation import AllocationContext, Budget
from rankfit.strategies.methods import Method


class ScoreBook:
    """Median over the clients of the scores of one round; a module that nobody measured is absent.

    One client moves a median no further than to the score of another, so that it does not decide
    the ranks of all. Of a module that one client alone was given, it is that client's.
    """

    def __init__(self) -> None:
        self._scores: dict[str, list[float]] = {}

    def see(self, metrics: Mapping[str, int | float]) -> None:
        """Add what one client measured."""
        for name, value in metrics.items():
            if name.startswith(Metric.SCORE):
                self._scores.setdefault(name.removeprefix(Metric.SCORE), []).append(float(value))

    def medians(self) -> dict[str, float]:
        """Of each module that was measured."""
        return {module: median_low(found) for module, found in self._scores.items()}

    @staticmethod
    def without(metrics: Mapping[str, int | float]) -> dict[str, int | float]:
        """All other metrics."""
        return {name: value for name, value in metrics.items() if not name.startswith(Metric.SCORE)}


log = logging.getLogger(__name__)

#: After out of memory, a client is planned with this share of what the failed plan was to take of
#: what training decides; CUDA's context stays.
AFTER_FAILURE = 0.95
#: FLOPs per second that no client is believed to reach.
FASTEST = 1e20
#: Plans that are kept for devices of the same kind.
KEPT = 20_000


class Planner:
    """Keeps the plans of a fleet up to date.

    Parameters
    ----------
    settings : RunSettings
        The run.
    method : Method
        Its allocation turns the largest ranks into the ranks that clients get.
    estimator : Estimator
        Gives a device the largest rank that fits; it is asked for each stage of the method
        (:meth:`~rankfit.estimator.plan_search.Estimator.during`).
    """

    def __init__(self, settings: RunSettings, method: Method, estimator: Estimator) -> None:
        self._settings = settings
        self._method = method
        self._estimators: dict[tuple[Trainable, ...], Estimator] = {estimator.phases: estimator}
        #: Bytes that a client is trusted with after it ran out of memory, by its name.
        self._ceilings: dict[str, int] = {}
        #: What kinds of devices were measured to take above their estimates.
        self.corrections = Corrections()
        self._reports: dict[str, DeviceReport] = {}
        #: What the rounds of each client were measured to take, where there is a deadline.
        self._throughputs: dict[str, Throughput] = {}
        #: Rank that a client pruned itself to, by its name.
        self._pruned: dict[str, int] = {}
        #: Importance of each module, for methods that ask for it; empty before it is measured.
        self.scores: dict[str, float] = {}
        #: Why a client gets no plan.
        self.refused: dict[str, str] = {}
        #: Clients that could train, whether or not the method gives them anything to do.
        self.able = 0
        self._fits: dict[object, Plan | NothingFits] = {}
        self._priced: dict[object, Plan | None] = {}
        self._last: dict[str, Plan] = {}

    def plan_fleet(
        self, reports: Mapping[str, DeviceReport], server_round: int = 1
    ) -> dict[str, Plan]:
        """Plan a round for every device that can train; the others are in :attr:`refused`.

        Raises
        ------
        ConfigError
            If there are devices, and none of them can train, or the method cannot use them.
        """
        stage = self._method.schedule(max(1, server_round), self._settings)
        estimator = self._estimator(stage.phases)
        for client, report in reports.items():
            before = self._reports.get(client)
            if before is not None and before.context_bytes != report.context_bytes:
                self.corrections.forget(report)
        self._reports = dict(reports)
        limited = {name: self._limit(report) for name, report in reports.items()}
        fitted: dict[str, Plan] = {}
        self.refused = {}
        for client, report in limited.items():
            fit = self._fit(estimator, report, self._throughputs.get(client))
            if isinstance(fit, NothingFits):
                self.refused[client] = fit.reason
            else:
                fitted[client] = fit
        if reports and not fitted:
            raise self._nobody()
        self.able = len(fitted)
        plans = self._spend(estimator, limited, fitted, max(1, server_round))
        if reports and not plans:
            raise self._nobody()
        extras = self._extras(server_round)
        stated = {
            client: replace(
                plan, trainable=stage.trainable, extras=extras, rates=self._method.rates
            )
            for client, plan in plans.items()
        }
        self._last = {client: self._steady(client, plan) for client, plan in stated.items()}
        return dict(self._last)

    def _steady(self, client: str, plan: Plan) -> Plan:
        """The client's last plan where only its budget has changed since: free memory flickers."""
        last = self._last.get(client)
        if last is None or replace(plan, budget_bytes=last.budget_bytes) != last:
            return plan
        return last

    def _spend(
        self,
        estimator: Estimator,
        reports: Mapping[str, DeviceReport],
        fitted: Mapping[str, Plan],
        server_round: int,
    ) -> dict[str, Plan]:
        """Plans at the ranks that the method chooses, within every device's budgets."""
        largest = {
            client: min(plan.rank, self._pruned.get(client, plan.rank))
            for client, plan in fitted.items()
        }
        modules = tuple(estimator.spec.targets)
        context = AllocationContext(largest, modules, server_round, self._settings, self.scores)
        plans = {}
        for client, ranks in self._method.allocate.ranks(context).items():
            wanted = {module: rank for module, rank in ranks.items() if rank > 0}
            if not wanted:
                continue
            throughput = self._throughputs.get(client)
            plan = self._priced_at(estimator, reports[client], fitted[client], wanted, throughput)
            if plan is None:
                self.refused[client] = self._unaffordable(estimator, fitted[client])
            else:
                plans[client] = plan
        for client in fitted:
            if client not in plans and client not in self.refused:
                self.refused[client] = f"left out by method {self._method.name}"
        return plans

    def ran_out(self, client: str, plan: Plan) -> None:
        """Plan smaller for a client that ran out of memory at a plan."""
        inside = plan.peak_bytes - plan.outside_bytes
        ceiling = plan.outside_bytes + int(AFTER_FAILURE * inside)
        self._ceilings[client] = min(ceiling, self._ceilings.get(client, ceiling))
        log.info("client %s is planned with %.1f MiB from now on", client, ceiling / 2**20)

    def measured(self, client: str, plan: Plan, peak_bytes: int) -> None:
        """Correct the figures of a client's kind of device from a peak that it measured.

        Only for updates that trained their whole plan, without falling back to a smaller one.
        """
        if client in self._reports:
            self.corrections.learn(self._reports[client], plan.peak_bytes, peak_bytes)

    def timed(self, client: str, plan: Plan, seconds: float, examples: int) -> None:
        """Learn a client's throughput from a round's time, for ``plan.deadline-seconds``.

        The mean with what was known, so that one slow round does not decide alone.

        Parameters
        ----------
        examples : int
            Samples trained on, repetitions included.
        """
        if not self._settings.plan.deadline_seconds or seconds <= 0 or examples <= 0:
            return
        estimator = self._estimator(("both",) if plan.trainable == "both" else (plan.trainable,))
        flops = examples * estimator.flops(plan) / seconds
        if not 0 < flops < FASTEST:
            log.warning("client %s: a round in %.3g s is faster than is believed", client, seconds)
            return
        throughput = Throughput(flops, examples)
        known = self._throughputs.get(client)
        if known is not None:
            mean = (throughput.flops_per_second + known.flops_per_second) / 2
            throughput = Throughput(mean, examples)
        self._throughputs[client] = throughput

    def kept_free(self, client: str) -> int:
        """Bytes kept free for a client beside its estimate, as its kind of device was measured."""
        report = self._reports.get(client)
        return 0 if report is None else self.corrections.extra_bytes(report)

    def pruned(self, client: str, rank: int) -> None:
        """Plan at most at the rank that a client pruned itself to."""
        self._pruned[client] = min(rank, self._pruned.get(client, rank))

    def state(self) -> dict[str, Any]:
        """What was learned about the fleet, for the checkpoint."""
        state: dict[str, Any] = {"ceilings": dict(self._ceilings)}
        if self.corrections.state():
            state["corrections"] = self.corrections.state()
        if self._throughputs:
            state["throughputs"] = {
                client: asdict(throughput) for client, throughput in self._throughputs.items()
            }
        if self._pruned:
            state["pruned"] = dict(self._pruned)
        if self.scores:
            state["scores"] = dict(self.scores)
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what an interrupted run had learned."""
        self._ceilings = {client: int(value) for client, value in state.get("ceilings", {}).items()}
        self.corrections.restore(state.get("corrections", {}))
        self._throughputs = {
            client: Throughput(**throughput)
            for client, throughput in state.get("throughputs", {}).items()
        }
        self._pruned = {client: int(rank) for client, rank in state.get("pruned", {}).items()}
        self.scores = {module: float(score) for module, score in state.get("scores", {}).items()}

    def _extras(self, server_round: int) -> tuple[Any, ...]:
        """What clients do beside training: scores are measured in the round before they are due."""
        settings, due = (
            self._settings,
            self._method.allocate.scored(server_round + 1, self._settings),
        )
        asked = ("scores",) if due and settings.method.scores == "clients" else ()
        return (*self._method.extras, *asked)

    def _estimator(self, phases: tuple[Trainable, ...]) -> Estimator:
        if phases not in self._estimators:
            self._estimators[phases] = next(iter(self._estimators.values())).during(phases)
        return self._estimators[phases]

    def _limit(self, report: DeviceReport) -> DeviceReport:
        budget = report.budget_bytes
        free = min(budget, self._ceilings.get(report.client, budget))
        free = max(0, free - self.corrections.extra_bytes(report))
        return report if free == budget else replace(report, free_bytes=free)

    def _fit(
        self, estimator: Estimator, report: DeviceReport, throughput: Throughput | None
    ) -> Plan | NothingFits:
        # Devices of one kind share a plan: ten thousand of them cost as much as one.
        kind = _kind(report)
        key = (estimator.phases, kind, throughput)
        if key not in self._fits:
            if len(self._fits) >= KEPT:  # free memory and throughput differ from round to round
                self._fits.clear()
            fit = estimator.fit(kind, throughput=throughput)
            found = (
                fit
                if isinstance(fit, NothingFits)
                else self._with_remainder(estimator, kind, fit.plan, throughput)
            )
            self._fits[key] = found
        return self._fits[key]

    def _with_remainder(
        self, estimator: Estimator, report: DeviceReport, plan: Plan, throughput: Throughput | None
    ) -> Plan:
        """The plan with a remainder, where the method brings one and it costs no trained rank."""
        if plan.remainder_rank or not self._method.start.brings_remainder:
            return plan
        fit = estimator.fit(report, throughput=throughput, remainder=True)
        if isinstance(fit, NothingFits):
            return plan
        same = replace(
            fit.plan,
            remainder_rank=plan.remainder_rank,
            peak_bytes=plan.peak_bytes,
            binding=plan.binding,
        )
        return fit.plan if same == plan else plan

    def _priced_at(
        self,
        estimator: Estimator,
        report: DeviceReport,
        plan: Plan,
        ranks: Mapping[str, int],
        throughput: Throughput | None,
    ) -> Plan | None:
        kind = _kind(report)
        key = (estimator.phases, kind, throughput, tuple(sorted(ranks.items())))
        if key not in self._priced:
            if len(self._priced) >= KEPT:
                self._priced.clear()
            budget = Budget(estimator, kind, plan, self._method.start.folds, throughput)
            self._priced[key] = budget.fit(ranks)
        return self._priced[key]

    def _unaffordable(self, estimator: Estimator, plan: Plan) -> str:
        payload = estimator.payload
        folded = sum(
            min(shape) * payload.direction_bytes(module) for module, shape in payload.shapes.items()
        )
        return (
            f"method {self._method.name} folds what it learns into the base: up to "
            f"{folded} bytes go to every client in every round, which this "
            "one's memory or download (plan.download-seconds) does not allow"
        )

    def _nobody(self) -> ConfigError:
        listed = "; ".join(f"{client} {reason}" for client, reason in self.refused.items())
        return ConfigError(f"no device can train even plan.min-rank: {listed}")


def _kind(report: DeviceReport) -> DeviceReport:
    """A report without what sets one device of a kind apart from another."""
    return replace(report, client="", uuid="", samples=-1)
