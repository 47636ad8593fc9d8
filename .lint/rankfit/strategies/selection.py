"""Who takes part in a round: the devices that are there, their plans, and the sample."""

import logging

from flwr.serverapp import Grid

from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.estimator.plan import Plan
from rankfit.strategies.fleet import Fleet, round_seed, sample, sample_by_weight
from rankfit.strategies.planning import Planner

log = logging.getLogger(__name__)


class Selection:
    """Plans for all devices, and draws the clients of a round.

    Parameters
    ----------
    settings : RunSettings
        Read for ``server`` and ``plan.read-memory``.
    planner : Planner
        Gives each device its plan.

    Attributes
    ----------
    fleet : Fleet
        The devices and what they report.
    plans : dict
        Plan of each client that can train, by its name.
    samples : dict
        Samples of each client, as its updates say.
    """

    def __init__(self, settings: RunSettings, planner: Planner) -> None:
        self.fleet = Fleet(
            settings.server.wait_seconds, int(settings.plan.measure_link_mib * 2**20)
        )
        self.plans: dict[str, Plan] = {}
        self.samples: dict[str, float] = {}
        self._settings = settings
        self._planner = planner
        #: Clients that had a plan until their free memory was read again.
        self._pressed: set[str] = set()

    def prepare(self, grid: Grid, server_round: int) -> None:
        """Wait for enough devices that can train, and plan for all of them.

        Raises
        ------
        FleetError
            If too few clients are there in time.
        """
        server = self._settings.server

        def ready() -> int:
            self.fleet.renew(grid, server_round, self._pressed)
            self._plan(server_round)
            return self._planner.able if self.plans else 0

        self.fleet.wait(grid, server_round, ready, server.min_clients, server.wait_seconds)
        self._pressed -= set(self.plans)

    def draw(self, grid: Grid, server_round: int) -> list[str]:
        """Draw the clients of a round, after planning for what they have free now.

        Where one of them can no longer train anything, others are drawn; it is asked again before
        the next round. Where nobody can, memory has ``server.wait-seconds`` to come back.

        Raises
        ------
        FleetError
            If it does not.
        """
        seed = round_seed(self._settings.run.seed, server_round)
        clients = self._sample(seed)
        if self._settings.plan.read_memory == "once":
            return clients
        asked: set[str] = set()
        while fresh := [client for client in clients if client not in asked]:
            asked |= set(fresh)
            if self.fleet.renew(grid, server_round, fresh):
                had = set(self.plans)
                self._plan(server_round)
                self._pressed |= had - set(self.plans)
                if not self.plans:
                    self.prepare(grid, server_round)
                clients = self._sample(seed)
        return clients

    def _plan(self, server_round: int) -> None:
        reports = {name: device.report for name, device in self.fleet.devices.items()}
        try:
            self.plans = self._planner.plan_fleet(reports, server_round)
        except ConfigError as error:
            if server_round == 0:  # nothing has begun: the settings do not fit this fleet
                raise
            log.warning("round %d has to wait: %s", server_round, error)
            self.plans = {}

    def _sample(self, seed: int) -> list[str]:
        count = self._settings.server.clients_per_round
        if self._settings.server.sampling == "uniform":
            return sample(self.plans, count, seed)
        # What a client has not reported is learnt from its first update; until then it counts as
        # the mean of those that are known.
        reported = {c: self.fleet.devices[c].report.samples for c in self.plans}
        known = self.samples | {c: n for c, n in reported.items() if n > 0}
        mean = sum(known.values()) / len(known) if known else 1.0
        return sample_by_weight({c: known.get(c, mean) for c in self.plans}, count, seed)
