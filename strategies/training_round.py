"""One round of training on the server: replies are read, screened, merged, and accounted for."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from flwr.app import Message

from rankfit.adapters.merge import Merge, Update
from rankfit.configs.protocol import Metric
from rankfit.configs.settings import RunSettings
from rankfit.estimator.device_report import DeviceReport
from rankfit.strategies.diagnostics import Diagnosis
from rankfit.strategies.planner import Planner, ScoreBook
from rankfit.strategies.replies import (
    Assignment,
    Metrics,
    Refused,
    read_failure,
    read_metrics,
    read_update,
    upload_bytes,
)
from rankfit.strategies.screening import Screening

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
    kind, reason : str
        Why not: the kind of fault, and a line of text ("" when merged).
    metrics : Mapping[str, int | float]
        What it measured, as it said, ``num-examples`` as it counted (empty when nothing came).
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
    samples = sum(float(o.metrics[Metric.NUM_EXAMPLES]) for o in merged)
    # A loss that is not finite is left out where it is read: that client has none.
    with_loss = [o.metrics for o in merged if Metric.TRAIN_LOSS in o.metrics]
    counted = sum(float(own[Metric.NUM_EXAMPLES]) for own in with_loss)
    weighted = sum(
        float(own[Metric.TRAIN_LOSS]) * float(own[Metric.NUM_EXAMPLES]) for own in with_loss
    )
    total: dict[str, int | float] = {
        "updates": len(merged),
        "dropped": len(listed) - len(merged),
        Metric.NUM_EXAMPLES: int(samples),
        "upload-bytes": sum(o.upload_bytes for o in listed),
        "download-bytes": sum(o.download_bytes for o in listed),
        "trained-parameters": sum(o.parameters for o in listed),
    }
    return total | ({Metric.TRAIN_LOSS: weighted / counted} if counted else {})


def spent(settings: RunSettings, metrics: Metrics) -> tuple[float, int]:
    """Seconds of training and samples trained on in a round, as its metrics say."""
    held, train = int(metrics[Metric.NUM_EXAMPLES]), settings.train
    examples = train.steps * min(train.batch_size, held) if train.steps else train.epochs * held
    return float(metrics.get(Metric.TRAIN_SECONDS, 0.0)), examples


@dataclass(frozen=True)
class Waiting:
    """An update that has been read and waits to be judged."""

    assignment: Assignment
    update: Update
    metrics: Metrics
    upload_bytes: int


class TrainingRound:
    """A round under way.

    Parameters
    ----------
    number : int
        The round.
    settings : RunSettings
        Read for ``server`` and ``train``.
    identity : str
        Of the run: an update of another run is refused.
    assignments : list of Assignment
        What each client was asked to do, in the order of the messages.
    reports : Callable[[str], DeviceReport]
        The device report of a client.
    empty_merge : Callable[[], Merge]
        The merge of the round, before anything is in it.
    planner : Planner
        Learns from what clients measured.
    screening : Screening
        Judges updates before they are merged.
    diagnosis : Diagnosis or None
        Sees what is merged, where ``server.diagnostics`` is on.

    Attributes
    ----------
    merge : Merge
        What has been merged so far.
    fault : str
        Why the merge cannot be used ("" = it can).
    """

    def __init__(
        self,
        number: int,
        settings: RunSettings,
        identity: str,
        assignments: list[Assignment],
        reports: Callable[[str], DeviceReport],
        empty_merge: Callable[[], Merge],
        planner: Planner,
        screening: Screening,
        diagnosis: Diagnosis | None,
    ) -> None:
        self.number = number
        self.assignments = assignments
        self.diagnosis = diagnosis
        self.merge = empty_merge()
        self.scores = ScoreBook()
        self.fault = ""
        self._settings = settings
        self._identity = identity
        self._reports = reports
        self._empty_merge = empty_merge
        self._planner = planner
        self._screening = screening
        self._outcomes: dict[str, Outcome] = {}
        #: Positions whose reply has come.
        self._answered: set[int] = set()
        #: Updates that were read and are not yet judged.
        self._waiting: list[Waiting] = []
        #: What is in the merge, to build it anew without an update that broke it; None = more than
        #: are kept.
        self._merged: list[Update] | None = []
        screening.open()

    def receive(self, position: int, reply: Message) -> bool:
        """Read the reply to the message at a position; False for a second one, which is left out.

        Its update waits until all are there that it is judged beside, or too many wait.
        """
        assignment = self.assignments[position]
        if position in self._answered:
            log.warning("a second update of %s in one round is left out", assignment.client)
            return False
        self._answered.add(position)
        self._read(assignment, reply)
        if len(self._waiting) > self._settings.server.max_waiting_updates:
            self.settle()
        return True

    def _read(self, assignment: Assignment, reply: Message) -> None:
        """Read a reply; whatever is wrong with it costs this update alone."""
        client, plan = assignment.client, assignment.plan
        if reply.has_error():
            failure = read_failure(reply)
            if failure.out_of_memory:
                self._planner.ran_out(client, plan)
            self._outcomes[client] = _outcome(assignment, failure.kind, failure.reason)
            return
        upload, metrics = upload_bytes(reply), dict[str, int | float]()
        try:
            metrics |= read_metrics(reply, assignment, self.number, self._identity)
            update = read_update(reply, assignment, metrics, self._settings.wire.dtype)
            reported = self._reports(client).samples
            update = self._screening.weigh(client, update, reported)
        except Refused as refused:
            dropped = _outcome(assignment, refused.kind, str(refused), metrics, upload)
            self._outcomes[client] = dropped
            return
        metrics[Metric.NUM_EXAMPLES] = max(1, int(update.weight))
        if self._settings.server.sampling == "samples":
            # Clients of many samples come more often; they must not count for more as well.
            update = replace(update, weight=1.0)
        self._waiting.append(Waiting(assignment, update, metrics, upload))

    def settle(self, *, last: bool = False) -> None:
        """Judge the updates that wait, and merge them or say why not."""
        if self._screening.needs_all and not last:
            return
        # Plain averaging has the rank of its first update: that of a client that fell back to a
        # smaller one must not decide for the others.
        ready = sorted(self._waiting, key=lambda own: Metric.RANK_CAP in own.metrics)
        self._waiting = []
        trainable = ready[0].assignment.plan.trainable if ready else "both"
        clients = [own.assignment.client for own in ready]
        updates = [own.update for own in ready]
        for own, judged in zip(
            ready, self._screening.judge(clients, updates, trainable), strict=True
        ):
            try:
                if isinstance(judged, Refused):
                    raise judged
                self._add(judged)
                if judged.trained is not own.update.trained:
                    own = replace(own, metrics={**own.metrics, "shortened": 1})
                outcome = self._learn(own, judged)
            except Refused as refused:
                outcome = _outcome(
                    own.assignment, refused.kind, str(refused), own.metrics, own.upload_bytes
                )
            self._outcomes[own.assignment.client] = outcome

    def _add(self, update: Update) -> None:
        """Merge one update, or leave the merge as it was.

        Raises
        ------
        Refused
            If the merge cannot take it.
        """
        try:
            self.merge.add(update)
        except Exception as error:  # noqa: BLE001 - one update must never end the run
            log.debug("an update could not be merged", exc_info=True)
            if self._merged is not None:  # part of it may be in the sums
                self.merge = self._empty_merge()
                for before in self._merged:
                    self.merge.add(before)
            elif not isinstance(error, ValueError):  # those come before anything is added
                self.fault = f"an update broke the merge ({type(error).__name__})"
            raise Refused("merge failed", f"{type(error).__name__}: {error}") from error
        if self._merged is not None:
            self._merged.append(update)
            if len(self._merged) > self._settings.server.max_waiting_updates:
                self._merged = None

    def _learn(self, own: Waiting, update: Update) -> Outcome:
        """Take what a merged update tells of its client, and return its outcome."""
        assignment, metrics = own.assignment, own.metrics
        client, plan = assignment.client, assignment.plan
        if metrics.get(Metric.OUT_OF_MEMORY, 0) > 0:
            log.warning(
                "client %s ran out of memory and fell back to micro-batch %d, rank %d",
                client, metrics.get(Metric.MICRO_BATCH, 0), metrics.get(Metric.RANK_CAP, plan.rank),
            )  # fmt: skip
            self._planner.ran_out(client, plan)
        if self.diagnosis is not None:
            self.diagnosis.see(update)
        self.scores.see(metrics)
        if metrics.get(Metric.PRUNED, 0) > 0:
            self._planner.pruned(client, int(metrics[Metric.RANK_CAP]))
        known = ScoreBook.without(self._measured(assignment, metrics))
        return replace(_outcome(assignment, "", "", known, own.upload_bytes), merged=True)

    def _measured(self, assignment: Assignment, metrics: Metrics) -> Metrics:
        """Learn from the measured peak of an update; return its metrics with what was expected."""
        client, plan = assignment.client, assignment.plan
        if not metrics.get(Metric.OUT_OF_MEMORY, 0):
            if metrics.get(Metric.PEAK_MEMORY_BYTES, 0) > 0:
                self._planner.measured(client, plan, int(metrics[Metric.PEAK_MEMORY_BYTES]))
            self._planner.timed(client, plan, *spent(self._settings, metrics))
        kept = self._planner.kept_free(client)
        return {**metrics, "expected-peak-bytes": plan.peak_bytes, "kept-free-bytes": kept}

    def outcomes(self, fault: str = "") -> list[Outcome]:
        """What became of every client, in the order of the messages.

        Parameters
        ----------
        fault : str
            What was wrong with the merge of the round: nothing of it counts then.
        """
        found = []
        for assignment in self.assignments:
            missing = _outcome(assignment, "no answer", "no answer before the deadline")
            outcome = self._outcomes.get(assignment.client, missing)
            if fault and outcome.merged:
                outcome = replace(outcome, merged=False, kind="merge failed", reason=fault)
            if not outcome.merged:
                log.warning(
                    "round %d: update of %s dropped: %s",
                    self.number, outcome.client, outcome.reason,
                )  # fmt: skip
            found.append(outcome)
        return found


def _outcome(
    assignment: Assignment, kind: str, reason: str, metrics: Metrics | None = None, upload: int = 0
) -> Outcome:
    """The outcome of a client; not merged, unless that is said of it afterwards."""
    trained = assignment.given.moving(assignment.plan.trainable).values()
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
