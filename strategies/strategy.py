"""The Flower Strategy for adapters whose ranks differ from client to client."""

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
from rankfit.adapters.merge import Merge
from rankfit.adapters.product_merges import join
from rankfit.adapters.wire import decode, encode, round_trip
from rankfit.configs.settings import ConfigError, RunSettings, derive
from rankfit.estimator.plan import Plan
from rankfit.strategies import messages
from rankfit.strategies.diagnostics import Diagnosis
from rankfit.strategies.fleet import Fleet, round_seed, sample, sample_by_weight
from rankfit.strategies.method import Method
from rankfit.strategies.planner import Planner, ScoreBook
from rankfit.strategies.replies import Assignment, BadUpdate, Metrics, read_update
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
    reason : str
        Why not ("" when merged).
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
    weighted = sum(
        float(o.metrics.get("train-loss", 0.0)) * float(o.metrics["num-examples"]) for o in merged
    )
    total: dict[str, int | float] = {
        "updates": len(merged),
        "dropped": len(listed) - len(merged),
        "num-examples": int(samples),
        "upload-bytes": sum(o.upload_bytes for o in listed),
        "download-bytes": sum(o.download_bytes for o in listed),
        "trained-parameters": sum(o.parameters for o in listed),
    }
    return total | ({"train-loss": weighted / samples} if samples else {})


def spent(settings: RunSettings, metrics: Metrics) -> tuple[float, int]:
    """Seconds of training and samples trained on in a round, as its metrics say."""
    held, train = int(metrics["num-examples"]), settings.train
    examples = train.steps * min(train.batch_size, held) if train.steps else train.epochs * held
    return float(metrics.get("train-seconds", 0.0)), examples


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


#: Measures the importance of each module at a global adapter, in a round.
Scorer = Callable[[Adapter, int], Mapping[str, float]]


@dataclass
class TrainingRound:
    """A round under way."""

    number: int
    merge: Merge
    assignments: list[Assignment]
    diagnosis: Diagnosis | None
    scores: ScoreBook
    outcomes: dict[str, Outcome] = field(default_factory=dict)


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
        merge = self.method.merge(adapter, derive(self.settings.run.seed, "merge", server_round))
        merge.tolerance = self.settings.server.merge_tolerance
        if self.settings.server.merge_device == "cuda":
            merge.device = training_device()
        self._round = TrainingRound(server_round, merge, assignments, diagnosis, ScoreBook())
        for assignment in assignments:
            self._held.pop(assignment.node_id, None)  # until it answers
        return outgoing

    def fold(self, position: int, reply: Message) -> Outcome:
        """Check the reply to the message at ``position`` and merge it, or say why not."""
        current = self._current()
        assignment = current.assignments[position]
        outcome = self._judge(current, assignment, reply)
        current.outcomes[assignment.client] = outcome
        if not reply.has_error():
            self._held[assignment.node_id] = assignment.prints
        return outcome

    def close_round(self) -> tuple[Adapter, list[Outcome]]:
        """Return the next global adapter and the outcome of every sampled client, in order."""
        current = self._current()
        self._round = None
        outcomes = []
        for assignment in current.assignments:
            missing = _dropped(assignment, "no answer before the deadline", {}, 0)
            outcomes.append(current.outcomes.get(assignment.client, missing))
        for outcome in outcomes:
            if not outcome.merged:
                log.warning(
                    "round %d: update of %s dropped: %s",
                    current.number, outcome.client, outcome.reason,
                )  # fmt: skip
        self.planner.scores |= current.scores.means()
        merged = self.advance(current.merge)
        if current.diagnosis is not None:
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
        state = {**self.planner.state(), "identity": self.identity}
        if self.settings.server.sampling == "samples":
            state["samples"] = dict(self._selection.samples)
        return state

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
        self._selection.samples = {c: float(n) for c, n in state.get("samples", {}).items()}
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
        """Pool the clients' metrics; see :func:`rankfit.tasks.metrics.pooled`."""
        total = pooled(messages.metrics(r) for r in replies if not r.has_error())
        return MetricRecord({**total}) if total else None

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

    def _judge(self, current: TrainingRound, assignment: Assignment, reply: Message) -> Outcome:
        if reply.has_error():
            reason = messages.failure(reply)
            if "OutOfMemoryError" in reason:  # not even its smallest fall-back fitted
                self.planner.ran_out(assignment.client, assignment.plan)
            return _dropped(assignment, reason, {}, 0)
        metrics: Metrics = messages.metrics(reply)
        arrays = messages.adapter_arrays(reply)
        upload = sum(array.nbytes for array in arrays.values())
        if metrics.get("out-of-memory", 0) > 0:
            log.warning(
                "client %s ran out of memory and fell back to micro-batch %d, rank %d",
                assignment.client,
                metrics.get("micro-batch", 0),
                metrics.get("rank-cap", assignment.plan.rank),
            )
            self.planner.ran_out(assignment.client, assignment.plan)
        try:
            limit, wire = self.settings.server.max_update_norm, self.settings.wire.dtype
            update = read_update(assignment, arrays, metrics, limit, wire)
            self._selection.samples[assignment.client] = update.weight
            if self.settings.server.sampling == "samples":
                # Clients of many samples come more often; they must not count for more as well.
                update = replace(update, weight=1.0)
            current.merge.add(update)
        except (BadUpdate, ValueError) as error:
            return _dropped(assignment, str(error), metrics, upload)
        if current.diagnosis is not None:
            current.diagnosis.see(update)
        current.scores.see(metrics)
        metrics = self._measured(assignment, metrics)
        if metrics.get("pruned", 0) > 0:
            self.planner.pruned(assignment.client, int(metrics["rank-cap"]))
        return replace(_dropped(assignment, "", ScoreBook.without(metrics), upload), merged=True)

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


def _dropped(assignment: Assignment, reason: str, metrics: Metrics, upload: int) -> Outcome:
    """The outcome of a client whose update is not part of the merge."""
    trained = assignment.given.moving(assignment.plan.moves).values()
    return Outcome(
        client=assignment.client,
        rank=assignment.plan.rank,
        merged=False,
        reason=reason,
        metrics=metrics,
        upload_bytes=upload,
        download_bytes=assignment.download_bytes,
        parameters=sum(tensor.numel() for tensor in trained),
    )
