"""The Flower Strategy for adapters whose ranks differ from client to client.

One round: :meth:`HeterogeneousLora.open_round` plans and addresses one message to each sampled
client; :meth:`fold` checks a reply and merges it; :meth:`close_round` gives the next global adapter
and says what became of every client. Flower's own interface is the same three steps.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from rankfit.adapters.merge import Merge
from rankfit.adapters.state import Adapter
from rankfit.adapters.wire import decode, encode
from rankfit.configs.seeds import derive
from rankfit.configs.settings import RunSettings
from rankfit.estimator.plan import Plan
from rankfit.strategies import messages
from rankfit.strategies.fleet import Fleet, round_seed, sample
from rankfit.strategies.method import Method
from rankfit.strategies.planning import Planner
from rankfit.strategies.replies import Assignment, BadUpdate, Metrics, read_update

log = logging.getLogger(__name__)


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
    """

    client: str
    rank: int
    merged: bool
    reason: str
    metrics: Metrics
    upload_bytes: int
    download_bytes: int


@dataclass
class TrainingRound:
    """A round under way."""

    number: int
    merge: Merge
    assignments: list[Assignment]
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
    """

    def __init__(
        self, settings: RunSettings, method: Method, planner: Planner, fingerprint: str
    ) -> None:
        self.settings = settings
        self.method = method
        self.planner = planner
        self.fingerprint = fingerprint
        self.fleet = Fleet(settings.server.wait_seconds)
        self.plans: dict[str, Plan] = {}
        self._round: TrainingRound | None = None

    def prepare(self, grid: Grid, server_round: int) -> None:
        """Wait for enough devices that can train, and plan for all of them.

        Raises
        ------
        FleetError
            If too few clients are there in time.
        """
        server = self.settings.server

        def ready() -> int:
            reports = {name: device.report for name, device in self.fleet.devices.items()}
            self.plans = self.planner.plan_fleet(reports)
            return len(self.plans)

        self.fleet.wait(grid, server_round, ready, server.min_clients, server.wait_seconds)

    def open_round(self, server_round: int, adapter: Adapter, grid: Grid) -> list[Message]:
        """Plan, sample, and build one message for each sampled client.

        Raises
        ------
        FleetError
            If too few clients are there in time.
        """
        self.prepare(grid, server_round)
        seed = round_seed(self.settings.run.seed, server_round)
        clients = sample(self.plans, self.settings.server.clients_per_round, seed)
        sent = Adapter.from_state_dict(
            decode(encode(adapter.state_dict(), self.settings.wire.dtype)), adapter.scale
        )
        moves = self.method.schedule(server_round)
        assignments, outgoing = [], []
        for client in clients:
            plan = replace(self.plans[client], moves=moves)
            assignment, message = self._assign(client, plan, sent, server_round)
            assignments.append(assignment)
            outgoing.append(message)
        merge = self.method.merge(adapter, derive(self.settings.run.seed, "merge", server_round))
        self._round = TrainingRound(server_round, merge, assignments)
        return outgoing

    def fold(self, position: int, reply: Message) -> Outcome:
        """Check the reply to the message at ``position`` and merge it, or say why not."""
        current = self._current()
        assignment = current.assignments[position]
        outcome = self._judge(current.merge, assignment, reply)
        current.outcomes[assignment.client] = outcome
        return outcome

    def close_round(self) -> tuple[Adapter, list[Outcome]]:
        """Return the next global adapter and the outcome of every sampled client, in order."""
        current = self._current()
        self._round = None
        outcomes = []
        for assignment in current.assignments:
            missing = self._dropped(assignment, "no answer before the deadline", {}, 0)
            outcomes.append(current.outcomes.get(assignment.client, missing))
        for outcome in outcomes:
            if not outcome.merged:
                log.warning(
                    "round %d: update of %s dropped: %s",
                    current.number, outcome.client, outcome.reason,
                )  # fmt: skip
        return current.merge.finish(), outcomes

    def evaluation_messages(self, server_round: int, adapter: Adapter) -> list[Message]:
        """Build one evaluation message, with the whole global adapter, for each client."""
        record = messages.arrays_record(encode(adapter.state_dict(), self.settings.wire.dtype))
        config = ConfigRecord(self._config(server_round, adapter.scale))
        seed = derive(self.settings.run.seed, "evaluate", server_round)
        clients = sample(self.plans, self.settings.server.clients_per_round, seed)
        return [
            messages.message(
                RecordDict({"adapter": record, "plan": config}),
                self.fleet.devices[client].node_id,
                messages.EVALUATE,
                server_round,
                self.settings.server.round_timeout_seconds,
            )
            for client in clients
        ]

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
        return arrays, MetricRecord(summarise(outcomes))

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
        """Average the clients' metrics, weighted by samples."""
        total = weighted_mean(messages.metrics(r) for r in replies if not r.has_error())
        return MetricRecord(total) if total else None

    def summary(self) -> None:
        """Log the method and the limits of the run."""
        log.info("method %s: %s (%s)", self.method.name, self.method.summary, self.method.source)
        log.info(
            "global rank %d, scale %g, %s on the wire",
            self.settings.lora.rank, self.settings.lora.scale, self.settings.wire.dtype,
        )  # fmt: skip

    def _assign(
        self, client: str, plan: Plan, sent: Adapter, server_round: int
    ) -> tuple[Assignment, Message]:
        """Cut the global adapter to a plan and address it. With a tail the whole of it travels."""
        node_id = self.fleet.devices[client].node_id
        given = sent.cut(plan.ranks)
        travels = sent if plan.tail_rank else given
        arrays = encode(travels.state_dict(), self.settings.wire.dtype)
        config = self._config(server_round, sent.scale) | {"client": client} | plan.to_dict()
        content = RecordDict(
            {"adapter": messages.arrays_record(arrays), "plan": ConfigRecord(config)}
        )
        ttl = self.settings.server.round_timeout_seconds
        message = messages.message(content, node_id, messages.TRAIN, server_round, ttl)
        download = sum(array.nbytes for array in arrays.values())
        return Assignment(client, node_id, plan, given, download), message

    def _config(self, server_round: int, scale: float) -> dict[str, int | float | str]:
        return {"round": server_round, "scale": scale, "fingerprint": self.fingerprint}

    def _judge(self, merge: Merge, assignment: Assignment, reply: Message) -> Outcome:
        if reply.has_error():
            return self._dropped(assignment, messages.failure(reply), {}, 0)
        metrics = messages.metrics(reply)
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
            merge.add(
                read_update(assignment, arrays, metrics, self.settings.server.max_update_norm)
            )
        except (BadUpdate, ValueError) as error:
            return self._dropped(assignment, str(error), metrics, upload)
        return Outcome(
            assignment.client, assignment.plan.rank, True, "", metrics, upload,
            assignment.download_bytes,
        )  # fmt: skip

    @staticmethod
    def _dropped(assignment: Assignment, reason: str, metrics: Metrics, upload: int) -> Outcome:
        return Outcome(
            assignment.client, assignment.plan.rank, False, reason, metrics, upload,
            assignment.download_bytes,
        )  # fmt: skip

    def _current(self) -> TrainingRound:
        if self._round is None:
            raise RuntimeError("no round is open: call open_round (or configure_train) first")
        return self._round

    def _adapter(self, arrays: ArrayRecord) -> Adapter:
        return Adapter.from_state_dict(
            decode(messages.record_arrays(arrays)), self.settings.lora.scale
        )


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
    }
    return total | ({"train-loss": weighted / samples} if samples else {})


def weighted_mean(replies: Iterable[Mapping[str, int | float]]) -> dict[str, float]:
    """Mean of metrics over clients, weighted by ``num-examples``; empty when there is none."""
    usable = [metrics for metrics in replies if metrics.get("num-examples", 0) > 0]
    total = sum(float(metrics["num-examples"]) for metrics in usable)
    if not usable:
        return {}
    keys = set.intersection(*(set(metrics) for metrics in usable)) - {"num-examples"}
    return {
        key: sum(float(m[key]) * float(m["num-examples"]) for m in usable) / total
        for key in sorted(keys)
    }
