"""The Flower Strategy for adapters whose ranks differ from client to client.

A round in the order of its methods: :meth:`HeterogeneousLora.prepare` waits for devices and plans
for all of them, :meth:`~HeterogeneousLora.open_round` draws clients and addresses a message to
each, :meth:`~HeterogeneousLora.receive` reads, screens and merges each reply,
:meth:`~HeterogeneousLora.close_round` gives the next global adapter.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from rankfit.adapters.adapter import Adapter
from rankfit.adapters.delta import ContentHashes
from rankfit.adapters.merge import Merge
from rankfit.adapters.product_merges import Refactored, join
from rankfit.adapters.robust import Vote
from rankfit.adapters.wire import decode, encode
from rankfit.configs.protocol import Metric, one_line
from rankfit.configs.settings import ConfigError, RunSettings, derive
from rankfit.estimator.plan import Plan
from rankfit.strategies import messages
from rankfit.strategies.diagnostics import Diagnosis
from rankfit.strategies.fleet import Fleet, round_seed, sample, sample_by_weight
from rankfit.strategies.methods import Method
from rankfit.strategies.planner import Planner
from rankfit.strategies.replies import (
    LARGEST_MERGED,
    Assignment,
    Metrics,
    Refused,
    at_most,
    read_evaluation,
)
from rankfit.strategies.screening import Screening, largest_weight
from rankfit.strategies.server_update import ServerUpdate
from rankfit.strategies.training_round import Outcome, TrainingRound, summarise
from rankfit.tasks.lora import training_device
from rankfit.tasks.metrics import pooled

log = logging.getLogger(__name__)

#: Robust merges that vote on the numbers of the factors, in the place of the method's merge.
VOTING = ("trimmed-mean", "median")
#: Measures the importance of each module at a global adapter, in a round.
Scorer = Callable[[Adapter, int], Mapping[str, float]]


class HeterogeneousLora(Strategy):
    """Queries devices, plans, sends each client an adapter of its own shapes, checks and merges.

    :func:`rankfit.server.loop.federate` calls it round by round, with checkpoints; Flower's own
    loop, ``strategy.start(grid, initial_arrays)``, gives the same adapter.

    Parameters
    ----------
    settings : RunSettings
        The run.
    method : Method
        From the catalogue.
    planner : Planner
        Gives each device its plan.
    fingerprint : str
        Of the base model; a client with another base refuses.
    scorer : Scorer
        Measures importance scores on the server, for methods that ask for them.
    """

    def __init__(
        self,
        settings: RunSettings,
        method: Method,
        planner: Planner,
        fingerprint: str,
        scorer: Scorer,
    ) -> None:
        if method.start.folds and settings.server.robust in VOTING:
            raise ConfigError(
                f"server.robust {settings.server.robust!r} votes on factors, and "
                f"{method.name} folds them into the base; choose another"
            )
        if settings.server.merge_device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("server.merge-device is 'cuda', but torch finds no GPU here")
        self.settings = settings
        self.method = method
        self.planner = planner
        self.fingerprint = fingerprint
        #: Tells this run from others of its name; clients keep their files by it.
        self.identity = secrets.token_hex(8)
        self.advance = ServerUpdate(settings, method.start.folds)
        #: Figures of the last closed round; see :class:`~rankfit.strategies.diagnostics.Diagnosis`.
        self.diagnostics: dict[str, float] = {}
        self._scorer = scorer
        #: The devices and what they report.
        self.fleet = Fleet.of(settings)
        #: Plan of each client that can train, by its name.
        self.plans: dict[str, Plan] = {}
        #: Clients that had a plan until their free memory was read again.
        self._lost_memory: set[str] = set()
        self.screening = Screening(settings.server)
        self._most_tests = 0
        self._round: TrainingRound | None = None
        #: The global adapter with which the open round began.
        self._reference = Adapter({}, settings.lora.scale, {})
        #: By node, hashes of what it was sent last and has answered.
        self._known_hashes: dict[int, ContentHashes] = {}

    @property
    def assignments(self) -> list[Assignment]:
        """What the clients of the open round were asked to do, in the order of the messages."""
        return self._current().assignments

    def know(self, samples: Mapping[str, int], most_samples: int, most_tests: int) -> None:
        """Bound what clients can claim, where the server has the data set that they share.

        Parameters
        ----------
        samples : Mapping[str, int]
            Training samples of each client, by its name.
        most_samples, most_tests : int
            All there are for training, and for tests.
        """
        self.screening.know(samples, most_samples)
        self._most_tests = most_tests

    def prepare(self, grid: Grid, server_round: int) -> None:
        """Wait for enough devices that can train, and plan for all of them.

        Raises
        ------
        FleetError
            If too few clients are there in time.
        """
        server = self.settings.server

        def able() -> int:
            self.fleet.renew(grid, server_round, self._lost_memory)
            self._plan_fleet(server_round)
            return self.planner.able if self.plans else 0

        self.fleet.wait(
            grid, server_round, able, lambda: self.planner.refused,
            server.min_clients, server.wait_seconds,
        )  # fmt: skip
        self._lost_memory -= set(self.plans)

    def open_round(self, server_round: int, adapter: Adapter, grid: Grid) -> list[Message]:
        """Plan, sample, and build one message for each sampled client.

        Raises
        ------
        FleetError
            If too few clients are there in time.
        """
        where = self.settings.method.scores
        if where == "server" and self.method.allocate.scored(server_round, self.settings):
            self.planner.scores = dict(self._scorer(adapter, server_round))
        self.prepare(grid, server_round)
        adapter = self.method.split(adapter)
        clients = self._draw(grid, server_round)
        diagnosis = Diagnosis(adapter) if self.settings.server.diagnostics else None
        addressed = [(c, self.fleet.devices[c].node_id, self.plans[c]) for c in clients]
        assignments, outgoing = self._dispatch(server_round).training(
            adapter, self.advance.folded, addressed, diagnosis
        )
        self._reference = adapter
        self._round = TrainingRound(
            server_round,
            self.settings,
            self.identity,
            assignments,
            lambda client: self.fleet.devices[client].report,
            partial(self._empty_merge, adapter, server_round),
            self.planner,
            self.screening,
            diagnosis,
        )
        for assignment in assignments:
            self._known_hashes.pop(assignment.node_id, None)  # until it answers
        return outgoing

    def receive(self, position: int, reply: Message) -> None:
        """Read the reply to the message at ``position``; its update waits to be judged and merged.

        A second reply to one message changes nothing.
        """
        current = self._current()
        if current.receive(position, reply) and not reply.has_error():
            assignment = current.assignments[position]
            self._known_hashes[assignment.node_id] = assignment.hashes

    def close_round(self) -> tuple[Adapter, list[Outcome]]:
        """Return the next global adapter and the outcome of every sampled client, in order.

        Where the merge gives no adapter that can be used, the round's updates are dropped, and the
        adapter stays as it was.
        """
        current = self._current()
        current.settle(last=True)
        self._round = None
        merged, fault = self._advance(current)
        outcomes = current.outcomes(fault)
        self.planner.scores |= current.scores.medians()
        if current.diagnosis is not None:
            self.diagnostics = {}
            if not fault:
                self.diagnostics = current.diagnosis.figures(
                    self.advance.merged or merged,
                    current.merge.residual(),
                    join(merged, self.advance.folded),
                )
        return merged, outcomes

    def exported(self, adapter: Adapter) -> Adapter:
        """What is evaluated and saved in the place of the adapter that training goes on from."""
        return self.advance.exported(adapter)

    def unaveraged(self, adapter: Adapter) -> Adapter:
        """What a moving average is taken of: the adapter with what was folded."""
        return join(adapter, self.advance.folded)

    def evaluation_messages(self, server_round: int, adapter: Adapter) -> list[Message]:
        """Build one evaluation message, with the whole global adapter, for each client."""
        seed = derive(self.settings.run.seed, "evaluate", server_round)
        clients = sample(self.plans, self.settings.server.clients_per_round, seed)
        nodes = [(c, self.fleet.devices[c].node_id, self.plans[c]) for c in clients]
        return self._dispatch(server_round).evaluation(adapter, nodes)

    def state(self) -> dict[str, Any]:
        """All that the next rounds depend on beside the adapter and :meth:`tensors`, for JSON."""
        state = {**self.planner.state(), **self.screening.state(), "identity": self.identity}
        return state | ({"names": dict(self.fleet.names)} if self.fleet.names else {})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors among it."""
        return self.advance.state()

    def restore(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], server_round: int
    ) -> None:
        """Take over the state of an interrupted run."""
        self.planner.restore(state)
        if server_round:  # before the first round nothing is known; an older release kept none
            self.identity = state.get("identity", "")
        self.screening.restore(state)
        self.fleet.names |= {name: int(node) for name, node in state.get("names", {}).items()}
        self.advance.restore(tensors, server_round)

    # Flower's interface: the same steps, with the global adapter as an ArrayRecord.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See the base class; ``config`` is not used: the plan says everything."""
        return self.open_round(server_round, self._adapter(arrays), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """See the base class; replies are merged in the order of the messages."""
        nodes = [assignment.node_id for assignment in self._current().assignments]
        known = [reply for reply in replies if reply.metadata.src_node_id in nodes]
        for reply in sorted(known, key=lambda r: nodes.index(r.metadata.src_node_id)):
            self.receive(nodes.index(reply.metadata.src_node_id), reply)
        adapter, outcomes = self.close_round()
        arrays = messages.arrays_record(encode(adapter.state_dict(), "float32"))
        return arrays, MetricRecord({**summarise(outcomes)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See the base class; no message unless ``server.evaluate`` is ``clients``."""
        if self.settings.server.evaluate != "clients":
            return []
        return self.evaluation_messages(server_round, self._adapter(arrays))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """See :meth:`evaluated`."""
        total = self.evaluated(replies)
        return MetricRecord({**total}) if total else None

    def evaluated(self, replies: Iterable[Message]) -> dict[str, float]:
        """Clients' metrics as if their examples lay in one place; what cannot be read is left out.

        See :func:`rankfit.tasks.metrics.pooled`. One client has half of the weight at most: its
        count is a claim. (Of an update it is less: that moves the model.)
        """
        usable: list[Metrics] = []
        for reply in replies:
            try:
                usable.append(read_evaluation(reply, self.settings, self._most_tests))
            except Refused as refused:
                node = reply.metadata.src_node_id
                log.warning("the evaluation of node %d is left out: %s", node, refused)
        counts = [float(metrics[Metric.NUM_EXAMPLES]) for metrics in usable]
        most = largest_weight(counts, max(0.5, self.settings.server.max_weight_share))
        return pooled(at_most(metrics, most) for metrics in usable)

    def summary(self) -> None:
        """Log the method and the limits of the run."""
        log.info("method %s: %s (%s)", self.method.name, self.method.summary, self.method.source)
        log.info(
            "global rank %d, scale %g, %s on the wire",
            self.settings.lora.rank, self.settings.lora.scale, self.settings.wire.dtype,
        )  # fmt: skip

    def _draw(self, grid: Grid, server_round: int) -> list[str]:
        """Draw the clients of a round, after planning for what they have free now.

        Where one of them can no longer train anything, others are drawn; it is asked again before
        the next round. Where nobody can, memory has ``server.wait-seconds`` to come back.

        Raises
        ------
        FleetError
            If it does not.
        """
        seed = round_seed(self.settings.run.seed, server_round)
        clients = self._sample(seed)
        if self.settings.plan.read_memory == "once":
            return clients
        asked: set[str] = set()
        while fresh := [client for client in clients if client not in asked]:
            asked |= set(fresh)
            if self.fleet.renew(grid, server_round, fresh):
                had = set(self.plans)
                self._plan_fleet(server_round)
                self._lost_memory |= had - set(self.plans)
                if not self.plans:
                    self.prepare(grid, server_round)
                clients = self._sample(seed)
        return clients

    def _plan_fleet(self, server_round: int) -> None:
        reports = {name: device.report for name, device in self.fleet.devices.items()}
        try:
            self.plans = self.planner.plan_fleet(reports, server_round)
        except ConfigError as error:
            if server_round == 0:  # nothing has begun: the settings do not fit this fleet
                raise
            log.warning("round %d has to wait: %s", server_round, error)
            self.plans = {}

    def _sample(self, seed: int) -> list[str]:
        count = self.settings.server.clients_per_round
        if self.settings.server.sampling == "uniform":
            return sample(self.plans, count, seed)
        # What a client has not reported is learned from its first update; until then it counts as
        # the mean of those that are known.
        reported = {c: self.fleet.devices[c].report.samples for c in self.plans}
        known = self.screening.samples | {c: n for c, n in reported.items() if n > 0}
        mean = sum(known.values()) / len(known) if known else 1.0
        return sample_by_weight({c: known.get(c, mean) for c in self.plans}, count, seed)

    def _dispatch(self, server_round: int) -> messages.Dispatch:
        start = self.method.start
        return messages.Dispatch(
            self.settings, start, self.fingerprint, self.identity, server_round, self._known_hashes
        )

    def _empty_merge(self, adapter: Adapter, server_round: int) -> Merge:
        """The method's merge of a round, or the vote that the run sets in its place."""
        server, make = self.settings.server, self.method.merge
        seed = derive(self.settings.run.seed, "merge", server_round)
        merge = make(adapter, seed)
        if server.robust in VOTING:
            share = server.robust_share if server.robust == "trimmed-mean" else None
            vote = partial(Vote, trimmed=share)
            # A method that re-factorises gives weak clients the strongest directions: so here.
            aligned = merge.aligned
            merge = vote(adapter, seed) if aligned else Refactored(adapter, seed, inner=vote)
        merge.tolerance, merge.threads = server.merge_tolerance, server.threads
        if server.merge_device == "cuda":
            merge.device = training_device()
        return merge

    def _advance(self, current: TrainingRound) -> tuple[Adapter, str]:
        """The next global adapter; or this round's with what was wrong with the next one."""
        before = self.advance.snapshot()
        try:
            if current.fault:
                raise RuntimeError(current.fault)
            merged = self.advance(current.merge)
            fault = _unusable(join(merged, self.advance.folded))
        except Exception as error:  # noqa: BLE001 - no update may end the run
            log.debug("a merge failed", exc_info=True)
            fault = f"the merge failed ({type(error).__name__}: {error})"
        if not fault:
            return merged, ""
        log.error("round %d: %s; the adapter stays as it was", current.number, one_line(fault, 300))
        self.advance.rewind(before)
        return self._reference, one_line(fault, 300)

    def _current(self) -> TrainingRound:
        if self._round is None:
            raise RuntimeError("no round is open: call open_round (or configure_train) first")
        return self._round

    def _adapter(self, arrays: ArrayRecord) -> Adapter:
        return Adapter.from_state_dict(
            decode(messages.record_arrays(arrays)), self.settings.lora.scale
        )


def _unusable(adapter: Adapter) -> str:
    """What keeps an adapter from being a checkpoint; "" = nothing does."""
    for name, tensor in adapter.state_dict().items():
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not largest <= LARGEST_MERGED:
            return f"the merged {name} holds {largest:.3g}; expected up to {LARGEST_MERGED:g}"
    return ""
