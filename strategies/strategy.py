"""The Flower Strategy for adapters whose ranks differ from client to client."""

import logging
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from rankfit.adapters.adapter import Adapter
from rankfit.adapters.delta import Prints, leave_out, prints
from rankfit.adapters.merge import Merge, Update
from rankfit.adapters.product_merges import Refactored, join
from rankfit.adapters.robust import Vote
from rankfit.adapters.wire import decode, encode, round_trip
from rankfit.configs.settings import ConfigError, RunSettings, derive
from rankfit.estimator.device_report import one_line
from rankfit.estimator.plan import Plan
from rankfit.strategies import messages
from rankfit.strategies.diagnostics import Diagnosis
from rankfit.strategies.fleet import Fleet, round_seed, sample, sample_by_weight
from rankfit.strategies.method import Method
from rankfit.strategies.planner import Planner, ScoreBook
from rankfit.strategies.replies import (
    LARGEST_MERGED,
    Assignment,
    Metrics,
    Refused,
    at_most,
    read_evaluation,
    read_failure,
    read_metrics,
    read_update,
    upload_bytes,
)
from rankfit.strategies.screening import Screening, largest_weight
from rankfit.strategies.server_update import Advance
from rankfit.strategies.start import Share, Start
from rankfit.tasks.lora import training_device
from rankfit.tasks.metrics import pooled


@dataclass(frozen=True)
class Outcome:
    """What became of one client in a round.

    Attributes
    ----------
    client : str
        Name of the client.
    rank : int
        Rank that it was asked to train.
    merged : bool
        Whether its update is part of the merge.
    kind, reason : str
        Why not: the kind of fault, and a line of text ("" when merged).
    metrics : Mapping[str, int | float]
        What it measured, as it said (empty when nothing came).
    upload_bytes, download_bytes : int
        Bytes of adapter from and to it.
    parameters : int
        Values that it was asked to train.
    """

    client: str
    rank: int
    merged: bool
    kind: str
    reason: str
    metrics: Metrics
    upload_bytes: int
    download_bytes: int
    parameters: int = 0


def summarise(outcomes: Iterable[Outcome]) -> dict[str, int | float]:
    """Totals of a round: loss and seconds weighted or summed over the merged updates."""
    listed = list(outcomes)
    merged = [outcome for outcome in listed if outcome.merged]
    samples = sum(float(o.metrics["num-examples"]) for o in merged)
    # A loss that is not finite is left out where it is read: that client has none.
    with_loss = [o.metrics for o in merged if "train-loss" in o.metrics]
    counted = sum(float(own["num-examples"]) for own in with_loss)
    weighted = sum(float(own["train-loss"]) * float(own["num-examples"]) for own in with_loss)
    total: dict[str, int | float] = {
        "updates": len(merged),
        "dropped": len(listed) - len(merged),
        "num-examples": int(samples),
        "upload-bytes": sum(o.upload_bytes for o in listed),
        "download-bytes": sum(o.download_bytes for o in listed),
        "trained-parameters": sum(o.parameters for o in listed),
    }
    return total | ({"train-loss": weighted / counted} if counted else {})


def spent(settings: RunSettings, metrics: Metrics) -> tuple[float, int]:
    """Seconds of training and samples trained on in a round, as its metrics say."""
    held, train = int(metrics["num-examples"]), settings.train
    examples = train.steps * min(train.batch_size, held) if train.steps else train.epochs * held
    return float(metrics.get("train-seconds", 0.0)), examples


log = logging.getLogger(__name__)

#: The program as which a SuperLink starts a ServerApp; that of a simulation has another name.
_DEPLOYED = "flwr-serverapp"


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
        names, deployed = settings.server.bind_names, Path(sys.argv[0]).stem == _DEPLOYED
        self.fleet = Fleet(
            settings.server.wait_seconds,
            int(settings.plan.measure_link_mib * 2**20),
            bind_names=names == "on" or (names == "auto" and deployed),
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


@dataclass(frozen=True)
class Parcel:
    """A share as it is sent, its hashes, and how far it is from the whole adapter."""

    share: Share
    record: ArrayRecord
    arrays: Mapping[str, NDArray[np.generic]]
    prints: Prints
    truncation: float


class Dispatch:
    """Addresses the messages of one round.

    Parameters
    ----------
    settings : RunSettings
        The run.
    start : Start
        What each client is given.
    fingerprint, identity : str
        Of the base model, a client with another base refuses; and of the run.
    number : int
        The round.
    held : Mapping[int, Prints]
        By node, hashes of what it was sent last.
    """

    def __init__(
        self,
        settings: RunSettings,
        start: Start,
        fingerprint: str,
        identity: str,
        number: int,
        held: Mapping[int, Prints],
    ) -> None:
        self._settings = settings
        self._start = start
        self._fingerprint = fingerprint
        self._identity = identity
        self._number = number
        self._held = held
        self._parcels: dict[object, Parcel] = {}

    def training(
        self,
        adapter: Adapter,
        folded: Adapter | None,
        clients: list[tuple[str, int, Plan]],
        diagnosis: Diagnosis | None,
    ) -> tuple[list[Assignment], list[Message]]:
        """One message for each (client, node id, plan), and what it asks for, in this order."""
        sent = self._arrives(adapter)
        behind = folded and self._arrives(folded)
        assignments, outgoing = [], []
        for client, node_id, plan in clients:
            parcel = self._parcel(sent, behind, client, plan, diagnosis)
            if diagnosis is not None:
                diagnosis.start(parcel.truncation)
            share = parcel.share
            config = self._config(share.given.scale) | {"client": client}
            record = ConfigRecord({**config, **plan.to_dict()})
            adapter_record, extra, sent_bytes = self._without_held(parcel, node_id)
            content = RecordDict({"adapter": adapter_record, "plan": record, **extra})
            outgoing.append(self._message(content, node_id, messages.TRAIN))
            assignments.append(
                Assignment(
                    client, node_id, plan, share.given, sent_bytes, share.indices, parcel.prints
                )
            )
        return assignments, outgoing

    def evaluation(self, adapter: Adapter, nodes: list[tuple[int, Plan]]) -> list[Message]:
        """One message for each (node id, plan), with the whole adapter, on the plan's base."""
        arrays = encode(adapter.state_dict(), self._settings.wire.dtype)
        record = messages.arrays_record(arrays)
        outgoing = []
        for node_id, plan in nodes:
            config = ConfigRecord({**self._config(adapter.scale), "precision": plan.precision})
            content = RecordDict({"adapter": record, "plan": config})
            outgoing.append(self._message(content, node_id, messages.EVALUATE))
        return outgoing

    def _parcel(
        self,
        sent: Adapter,
        folded: Adapter | None,
        client: str,
        plan: Plan,
        diagnosis: Diagnosis | None,
    ) -> Parcel:
        same = (tuple(plan.ranks.items()), plan.tail_rank)
        key = (same, client) if self._start.draws else same
        if key not in self._parcels:
            seed = derive(self._settings.run.seed, "start", self._number, client)
            share = self._start.share(sent, folded, plan, seed)
            arrays = encode(share.travels.state_dict(), self._settings.wire.dtype)
            self._parcels[key] = Parcel(
                share,
                messages.arrays_record(arrays),
                arrays,
                prints(arrays) if self._settings.wire.delta else {},
                diagnosis.truncation(share, self._start.folds) if diagnosis else 0.0,
            )
        return self._parcels[key]

    def _without_held(
        self, parcel: Parcel, node_id: int
    ) -> tuple[ArrayRecord, dict[str, ConfigRecord], int]:
        """What is sent to a node, how it is completed there, and its bytes."""
        sent, record, extra = parcel.arrays, parcel.record, dict[str, ConfigRecord]()
        if self._settings.wire.delta:
            fewer, places = leave_out(sent, parcel.prints, self._held.get(node_id, {}))
            extra["held"] = ConfigRecord({**places})
            if places:
                sent, record = fewer, messages.arrays_record(fewer)
        return record, extra, sum(array.nbytes for array in sent.values())

    def _arrives(self, adapter: Adapter) -> Adapter:
        """An adapter after the wire type's rounding."""
        state = round_trip(adapter.state_dict(), self._settings.wire.dtype)
        return Adapter.from_state_dict(state, adapter.scale)

    def _config(self, scale: float) -> dict[str, int | float | str]:
        return {
            "round": self._number, "scale": scale, "fingerprint": self._fingerprint,
            "run": self._identity,
        }  # fmt: skip

    def _message(self, content: RecordDict, node_id: int, kind: str) -> Message:
        ttl = self._settings.server.round_timeout_seconds
        return messages.message(content, node_id, kind, self._number, ttl)


#: Robust merges that vote on the numbers of the factors, in the place of the method's merge.
VOTING = ("trimmed-mean", "median")
#: Measures the importance of each module at a global adapter, in a round.
Scorer = Callable[[Adapter, int], Mapping[str, float]]


@dataclass(frozen=True)
class Waiting:
    """An update that has been read and waits to be judged."""

    assignment: Assignment
    update: Update
    metrics: Metrics
    upload_bytes: int


@dataclass
class TrainingRound:
    """A round under way.

    Attributes
    ----------
    answered : set of int
        Positions whose reply has come.
    waiting : list of Waiting
        Updates that were read and are not yet judged.
    folded : list of Update or None
        What is in the merge, to build it anew without an update that broke it; None = more than
        are kept.
    fault : str
        Why the merge cannot be used ("" = it can).
    """

    number: int
    reference: Adapter
    merge: Merge
    assignments: list[Assignment]
    diagnosis: Diagnosis | None
    scores: ScoreBook
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    waiting: list[Waiting] = field(default_factory=list)
    folded: list[Update] | None = field(default_factory=list)
    fault: str = ""


class HeterogeneousLora(Strategy):
    """Queries devices, plans, sends each client an adapter of its own shapes, checks and merges.

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
        self.advance = Advance(settings, method.start.folds)
        #: Figures of the last closed round; see :class:`~rankfit.strategies.diagnostics.Diagnosis`.
        self.diagnostics: dict[str, float] = {}
        self._scorer = scorer
        self._selection = Selection(settings, planner)
        self.screening = Screening(settings.server)
        self._selection.samples = self.screening.samples
        self._most_tests = 0
        self._round: TrainingRound | None = None
        #: By node, hashes of what it was sent last and has answered.
        self._held: dict[int, Prints] = {}

    @property
    def fleet(self) -> Fleet:
        """The devices and what they report."""
        return self._selection.fleet

    @property
    def plans(self) -> dict[str, Plan]:
        """Plan of each client that can train."""
        return self._selection.plans

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
        """Wait for enough devices that can train, and plan for all; see :class:`Selection`."""
        self._selection.prepare(grid, server_round)

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
        clients = self._selection.draw(grid, server_round)
        diagnosis = Diagnosis(adapter) if self.settings.server.diagnostics else None
        addressed = [(c, self.fleet.devices[c].node_id, self.plans[c]) for c in clients]
        assignments, outgoing = self._dispatch(server_round).training(
            adapter, self.advance.folded, addressed, diagnosis
        )
        merge = self._empty_merge(adapter, server_round)
        self.screening.open()
        self._round = TrainingRound(
            server_round, adapter, merge, assignments, diagnosis, ScoreBook()
        )
        for assignment in assignments:
            self._held.pop(assignment.node_id, None)  # until it answers
        return outgoing

    def fold(self, position: int, reply: Message) -> None:
        """Read the reply to the message at ``position``; its update waits to be judged and merged.

        A second reply to one message changes nothing.
        """
        current = self._current()
        assignment = current.assignments[position]
        if position in current.answered:
            log.warning("a second update of %s in one round is left out", assignment.client)
            return
        current.answered.add(position)
        self._read(current, assignment, reply)
        if not reply.has_error():
            self._held[assignment.node_id] = assignment.prints
        if len(current.waiting) > self.settings.server.max_waiting_updates:
            self._settle(current)

    def close_round(self) -> tuple[Adapter, list[Outcome]]:
        """Return the next global adapter and the outcome of every sampled client, in order.

        Where the merge gives no adapter that can be used, the round's updates are dropped, and the
        adapter stays as it was.
        """
        current = self._current()
        self._settle(current, last=True)
        self._round = None
        merged, fault = self._advance(current)
        outcomes = []
        for assignment in current.assignments:
            missing = _dropped(assignment, "no answer", "no answer before the deadline")
            outcome = current.outcomes.get(assignment.client, missing)
            if fault and outcome.merged:
                outcome = replace(outcome, merged=False, kind="merge failed", reason=fault)
            outcomes.append(outcome)
        for outcome in outcomes:
            if not outcome.merged:
                log.warning(
                    "round %d: update of %s dropped: %s",
                    current.number, outcome.client, outcome.reason,
                )  # fmt: skip
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
        nodes = [(self.fleet.devices[client].node_id, self.plans[client]) for client in clients]
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
        self._selection.samples = self.screening.samples
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
            self.fold(nodes.index(reply.metadata.src_node_id), reply)
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

        See :func:`rankfit.tasks.metrics.pooled`.
        """
        usable: list[Metrics] = []
        for reply in replies:
            try:
                usable.append(read_evaluation(reply, self.settings, self._most_tests))
            except Refused as refused:
                node = reply.metadata.src_node_id
                log.warning("the evaluation of node %d is left out: %s", node, refused)
        counts = [float(metrics["num-examples"]) for metrics in usable]
        most = largest_weight(counts, self.settings.server.max_weight_share)
        return pooled(at_most(metrics, most) for metrics in usable)

    def summary(self) -> None:
        """Log the method and the limits of the run."""
        log.info("method %s: %s (%s)", self.method.name, self.method.summary, self.method.source)
        log.info(
            "global rank %d, scale %g, %s on the wire",
            self.settings.lora.rank, self.settings.lora.scale, self.settings.wire.dtype,
        )  # fmt: skip

    def _dispatch(self, server_round: int) -> Dispatch:
        start = self.method.start
        return Dispatch(
            self.settings, start, self.fingerprint, self.identity, server_round, self._held
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
        merge.tolerance = server.merge_tolerance
        if server.merge_device == "cuda":
            merge.device = training_device()
        return merge

    def _read(self, current: TrainingRound, assignment: Assignment, reply: Message) -> None:
        """Read a reply; whatever is wrong with it costs this update alone."""
        client, plan = assignment.client, assignment.plan
        if reply.has_error():
            failure = read_failure(reply)
            if failure.out_of_memory:
                self.planner.ran_out(client, plan)
            current.outcomes[client] = _dropped(assignment, failure.kind, failure.reason)
            return
        upload, metrics = upload_bytes(reply), dict[str, int | float]()
        try:
            metrics |= read_metrics(reply, assignment, current.number, self.identity)
            update = read_update(reply, assignment, metrics, self.settings.wire.dtype)
            reported = self.fleet.devices[client].report.samples
            update = self.screening.weigh(client, update, reported)
        except Refused as refused:
            dropped = _dropped(assignment, refused.kind, str(refused), metrics, upload)
            current.outcomes[client] = dropped
            return
        metrics["num-examples"] = max(1, int(update.weight))
        if self.settings.server.sampling == "samples":
            # Clients of many samples come more often; they must not count for more as well.
            update = replace(update, weight=1.0)
        current.waiting.append(Waiting(assignment, update, metrics, upload))

    def _settle(self, current: TrainingRound, *, last: bool = False) -> None:
        """Judge the updates that wait, and merge them or say why not."""
        if self.screening.needs_all and not last:
            return
        # Plain averaging has the rank of its first update: that of a client that fell back to a
        # smaller one must not decide for the others.
        ready = sorted(current.waiting, key=lambda own: "rank-cap" in own.metrics)
        current.waiting = []
        moves = ready[0].assignment.plan.moves if ready else "both"
        known = [self.screening.is_known(own.assignment.client) for own in ready]
        updates = [own.update for own in ready]
        for own, judged in zip(ready, self.screening.judge(updates, moves, known), strict=True):
            try:
                if isinstance(judged, Refused):
                    raise judged
                self._merge(current, judged)
                outcome = self._merged(current, own, judged)
            except Refused as refused:
                outcome = _dropped(
                    own.assignment, refused.kind, str(refused), own.metrics, own.upload_bytes
                )
            current.outcomes[own.assignment.client] = outcome

    def _merge(self, current: TrainingRound, update: Update) -> None:
        """Fold one update in, or leave the merge as it was.

        Raises
        ------
        Refused
            If the merge cannot take it.
        """
        try:
            current.merge.add(update)
        except Exception as error:  # noqa: BLE001 - one update must never end the run
            log.debug("an update could not be merged", exc_info=True)
            if current.folded is not None:  # part of it may be in the sums
                current.merge = self._empty_merge(current.reference, current.number)
                for before in current.folded:
                    current.merge.add(before)
            elif not isinstance(error, ValueError):  # those come before anything is added
                current.fault = f"an update broke the merge ({type(error).__name__})"
            raise Refused("merge failed", f"{type(error).__name__}: {error}") from error
        if current.folded is not None:
            current.folded.append(update)
            if len(current.folded) > self.settings.server.max_waiting_updates:
                current.folded = None

    def _merged(self, current: TrainingRound, own: Waiting, update: Update) -> Outcome:
        """Learn from an update that was merged; its outcome."""
        assignment, metrics = own.assignment, own.metrics
        client, plan = assignment.client, assignment.plan
        if metrics.get("out-of-memory", 0) > 0:
            log.warning(
                "client %s ran out of memory and fell back to micro-batch %d, rank %d",
                client, metrics.get("micro-batch", 0), metrics.get("rank-cap", plan.rank),
            )  # fmt: skip
            self.planner.ran_out(client, plan)
        if current.diagnosis is not None:
            current.diagnosis.see(update)
        current.scores.see(metrics)
        if metrics.get("pruned", 0) > 0:
            self.planner.pruned(client, int(metrics["rank-cap"]))
        known = ScoreBook.without(self._measured(assignment, metrics))
        return replace(_dropped(assignment, "", "", known, own.upload_bytes), merged=True)

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
        return current.reference, one_line(fault, 300)

    def _measured(self, assignment: Assignment, metrics: Metrics) -> Metrics:
        """Learn from the measured peak of an update; return its metrics with what was expected."""
        client, plan = assignment.client, assignment.plan
        if not metrics.get("out-of-memory", 0):
            if metrics.get("peak-memory-bytes", 0) > 0:
                self.planner.measured(client, plan, int(metrics["peak-memory-bytes"]))
            self.planner.timed(client, plan, *spent(self.settings, metrics))
        kept = self.planner.kept_free(client)
        return {**metrics, "expected-peak-bytes": plan.peak_bytes, "kept-free-bytes": kept}

    def _current(self) -> TrainingRound:
        if self._round is None:
            raise RuntimeError("no round is open: call open_round (or configure_train) first")
        return self._round

    def _adapter(self, arrays: ArrayRecord) -> Adapter:
        return Adapter.from_state_dict(
            decode(messages.record_arrays(arrays)), self.settings.lora.scale
        )


def _dropped(
    assignment: Assignment, kind: str, reason: str, metrics: Metrics | None = None, upload: int = 0
) -> Outcome:
    """The outcome of a client whose update is not part of the merge."""
    trained = assignment.given.moving(assignment.plan.moves).values()
    return Outcome(
        client=assignment.client,
        rank=assignment.plan.rank,
        merged=False,
        kind=kind,
        reason=reason,
        metrics=metrics or {},
        upload_bytes=upload,
        download_bytes=assignment.download_bytes,
        parameters=sum(tensor.numel() for tensor in trained),
    )


def _unusable(adapter: Adapter) -> str:
    """What keeps an adapter from being a checkpoint; "" = nothing does."""
    for name, tensor in adapter.state_dict().items():
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not largest <= LARGEST_MERGED:
            return f"the merged {name} holds {largest:.3g}; expected up to {LARGEST_MERGED:g}"
    return ""
