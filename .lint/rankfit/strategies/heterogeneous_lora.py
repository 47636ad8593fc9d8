"""The Flower Strategy for adapters whose ranks differ from client to client.

One round: :meth:`HeterogeneousLora.open_round` plans and addresses one message to each sampled
client; :meth:`fold` checks a reply and merges it; :meth:`close_round` gives the next global adapter
and says what became of every client. Flower's own interface is the same three steps.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from rankfit.adapters.folding import join
from rankfit.adapters.held import Prints
from rankfit.adapters.merge import Merge
from rankfit.adapters.state import Adapter
from rankfit.adapters.wire import decode, encode
from rankfit.configs.seeds import derive
from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.estimator.plan import Plan
from rankfit.strategies import messages
from rankfit.strategies.advance import Advance
from rankfit.strategies.diagnosis import Diagnosis
from rankfit.strategies.dispatch import Dispatch
from rankfit.strategies.fleet import Fleet, sample
from rankfit.strategies.method import Method
from rankfit.strategies.outcome import Outcome, spent, summarise
from rankfit.strategies.planning import Planner
from rankfit.strategies.replies import Assignment, BadUpdate, Metrics, read_update
from rankfit.strategies.scores import ScoreBook
from rankfit.strategies.selection import Selection
from rankfit.tasks.adapted import training_device
from rankfit.tasks.scores import pooled

log = logging.getLogger(__name__)

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
        #: Figures of the last closed round; see :class:`~rankfit.strategies.diagnosis.Diagnosis`.
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
        """Pool the clients' metrics; see :func:`rankfit.tasks.scores.pooled`."""
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
