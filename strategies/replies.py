"""The one place where what a client sends is interpreted: a typed, clean value, or a refusal.

Device reports, training replies and evaluation replies are read here and nowhere else. Names and
texts are cleaned, numbers must be known by name, of their type and in their range, and arrays are
of just the names, number types and sizes that the plan asks for before any of them is copied.
Whatever is wrong is a :class:`Refused`, with the kind of fault and one line of text; nothing that a
client sends raises anything else.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

from rankfit.adapters.adapter import Adapter
from rankfit.adapters.delta import ContentHashes
from rankfit.adapters.merge import Update
from rankfit.adapters.wire import (
    Arrays,
    WireError,
    WireType,
    decode_update,
    layout,
    payload_bytes,
    read_npy,
)
from rankfit.configs.faults import Fault
from rankfit.configs.protocol import (
    ADAPTER,
    CLIENT,
    DEVICE,
    EVALUATION,
    METRICS,
    MOST_GROUPS,
    OF_GROUP,
    ORIGIN,
    SCORES,
    TRAINING,
    Bounds,
    ClientState,
    Metric,
    OutOfRange,
    one_line,
    shown,
)
from rankfit.configs.settings import RunSettings, split_list
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.plan import Plan
from rankfit.tasks.metrics import DEFAULT

Metrics = Mapping[str, int | float]

#: Largest number in an update, and in what is merged of updates (whose factors are those of
#: products): far above any that training gives, and its squares and products stay in float32.
LARGEST_VALUE, LARGEST_MERGED = 1e5, 1e9
#: Characters of a reason, and of a name in it.
_REASON, _NAME = 300, 120

#: Characters of a client's reason that are read.
_READ = 4000
#: Flower's error codes; 3, 4 and 5 are written by the SuperLink on the client's behalf.
_ERRORS = {
    0: "unknown error, or its process died",
    1: "its app could not be loaded",
    2: "it raised an error",
    3: "the message expired before it was fetched",
    4: "its reply never came",
    5: "its node is gone",
    6: "a mod refused the message",
    7: "its app bundle is invalid",
    8: "its process died",
}

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Refused(ValueError):
    """Something that a client sent and that is not used.

    Parameters
    ----------
    kind : str
        Kind of fault, in a few words: what a run counts.
    reason : str
        What is wrong, in one line.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(one_line(reason, _REASON))
        self.kind = kind


def _figure(name: str, value: object, bounds: Bounds) -> int | float:
    """A number within its bounds, or a refusal."""
    try:
        return bounds.read(name, value)
    except OutOfRange as error:
        raise Refused("bad figure", str(error)) from error


@dataclass(frozen=True)
class Assignment:
    """What one client was asked to do in a round.

    Attributes
    ----------
    client : str
        Name of the client.
    node_id : int
        Flower node that it answers from.
    plan : Plan
        What it should do.
    given : Adapter
        The trainable part that it starts from, as it arrives (after the wire type's rounding).
    download_bytes : int
        Bytes of adapter sent to it.
    indices : Mapping[str, Tensor]
        By module, which directions of the global adapter it was given (absent = the leading ones).
    hashes : ContentHashes
        Hashes of what it holds once it has answered.
    """

    client: str
    node_id: int
    plan: Plan
    given: Adapter
    download_bytes: int
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    hashes: ContentHashes = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An error in the place of a reply: its kind, one line of text, and whether memory ran out."""

    kind: str
    reason: str
    out_of_memory: bool


def total(read: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a reader total: whatever else it raises on a hostile input is a refusal as well."""

    @functools.wraps(read)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return read(*args, **kwargs)
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001 - a reply must never end the run
            raise Refused("unreadable", f"{type(error).__name__} while it was read") from error

    return guarded


def failure(reply: Message) -> str:
    """Say why a reply carries an error, in words that are the server's own."""
    found = fault(reply)
    if found is not None:
        return found.sentence()
    # What else stands there may come from anyone, and hold anything: it is not shown.
    return _ERRORS.get(reply.error.code, f"error {reply.error.code}")


def fault(reply: Message) -> Fault | None:
    """The fault that a reply with an error names; None if it names none of RankFit's."""
    return Fault.read((reply.error.reason or "")[:_READ])


def read_failure(reply: Message) -> Failure:
    """Why a reply carries an error; its text is cleaned and cut."""
    try:
        found = fault(reply)
        text = failure(reply)
    except Exception as error:  # noqa: BLE001 - see total
        found, text = None, f"an error that cannot be read ({type(error).__name__})"
    # Not even its smallest fall-back fitted.
    lost = found is not None and found.code == "memory-out"
    kind = "out of memory" if lost else "client error"
    return Failure(kind, one_line(text, _REASON), lost)


@total
def read_report(reply: Message) -> DeviceReport:
    """The device report in a reply to :data:`rankfit.configs.protocol.QUERY`."""
    if reply.has_error():
        failure = read_failure(reply)
        raise Refused(failure.kind, failure.reason)
    record = reply.content.config_records.get(DEVICE)
    if record is None:
        raise Refused("bad report", "the reply to the query holds no device report")
    try:
        return DeviceReport.from_dict(record)
    except ValueError as error:
        raise Refused("bad report", str(error)) from error


def keeps_worker(reply: Message) -> bool:
    """Whether the client that sent this reply to the query keeps a process for more."""
    if reply.has_error():
        return False
    return _client_state(reply).worker


def partitions(reply: Message) -> int:
    """Nodes that the sender of this reply to the query shares a data set with; 0 = none."""
    if reply.has_error():
        return 0
    return _client_state(reply).partitions


def _client_state(reply: Message) -> ClientState:
    return ClientState.from_dict(reply.content.config_records.get(CLIENT, ConfigRecord()))


def upload_bytes(reply: Message) -> int:
    """Bytes of the numbers in the arrays of a reply, as they came."""
    if reply.has_error():
        return 0
    record = reply.content.array_records.get(ADAPTER, ArrayRecord())
    return sum(payload_bytes(array.data) for array in record.values())


@total
def read_metrics(reply: Message, assignment: Assignment, round_: int, run: str) -> Metrics:
    """What a client measured in its training, after a look at which training it was.

    A training loss that is not finite (fp16 can overflow) is left out, and so are figures of other
    names: none of the server's own can be overwritten.

    Parameters
    ----------
    round_, run : int, str
        The round and the identity of the run: an answer to another message is refused.
    """
    if reply.metadata.src_node_id != assignment.node_id:
        raise Refused("wrong node", f"it came from node {shown(reply.metadata.src_node_id)}")
    _check_origin(reply, round_, run)
    record = reply.content.metric_records.get(METRICS, MetricRecord())
    plan, found = assignment.plan, dict[str, int | float]()
    loss = record.get(Metric.TRAIN_LOSS)
    for name, bounds in TRAINING.items():
        if name not in record or (name == Metric.TRAIN_LOSS and not _finite(loss)):
            continue
        found[name] = _figure(name, record[name], bounds)
    if Metric.NUM_EXAMPLES not in found:
        raise Refused("bad figure", "num-examples is 0; expected at least 1")
    for name, most in ((Metric.RANK_CAP, plan.rank), (Metric.MICRO_BATCH, plan.micro_batch)):
        if found.get(name, 0) > most:
            raise Refused("bad figure", f"{name} is {found[name]}; the plan has {most}")
    pruned, lost = found.get(Metric.PRUNED, 0), found.get(Metric.OUT_OF_MEMORY, 0)
    if pruned and ("prune" not in plan.extras or Metric.RANK_CAP not in found):
        raise Refused("bad figure", "it pruned its rank, unasked or without a rank-cap")
    if Metric.RANK_CAP in found and not (pruned or lost):
        raise Refused("bad figure", "rank-cap without having pruned or run out of memory")
    if "scores" in plan.extras:
        scores = {f"{Metric.SCORE}{module}" for module in assignment.given.factors}
        found |= {n: _figure(n, record[n], SCORES) for n in sorted(scores & set(record))}
    return found


@total
def read_update(
    reply: Message, assignment: Assignment, metrics: Metrics, wire_type: WireType
) -> Update:
    """The update of a reply, at the number of samples that it names.

    A client that ran out of memory may have lowered its rank; it says so in ``rank-cap``, and its
    factors are then those of the first ``rank-cap`` directions.
    """
    record = reply.content.array_records.get(ADAPTER, ArrayRecord())
    given = _given(assignment, metrics)
    expected = given.moving(assignment.plan.trainable)
    try:
        state = decode_update(_arrays(record, expected, wire_type), expected, wire_type)
    except WireError as error:
        raise Refused("bad arrays", str(error)) from error
    for name, tensor in state.items():
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not math.isfinite(largest):
            raise Refused("not finite", f"{name} holds values that are not finite")
        if largest > LARGEST_VALUE:
            raise Refused(
                "too large", f"{name} holds {largest:.3g}; expected up to {LARGEST_VALUE:g}"
            )
    trained = Adapter.from_state_dict(given.state_dict() | state, given.scale)
    indices = {
        m: assignment.indices[m][:r] for m, r in given.ranks.items() if m in assignment.indices
    }
    return Update(given, trained, float(metrics[Metric.NUM_EXAMPLES]), indices)


@total
def read_evaluation(reply: Message, settings: RunSettings, most_tests: int = 0) -> Metrics:
    """What a client measured in an evaluation: all figures of the run's task, and only those.

    Parameters
    ----------
    most_tests : int
        Examples that no client can have more of (0 = not known).
    """
    if reply.has_error():
        failure = read_failure(reply)
        raise Refused(failure.kind, failure.reason)
    record = reply.content.metric_records.get(METRICS, MetricRecord())
    wanted = {Metric.NUM_EXAMPLES, *expected_figures(settings)}
    missing = sorted(wanted - set(record))
    if missing:
        raise Refused("bad figure", f"the evaluation lacks {missing[0]}")
    found = {name: _figure(name, record[name], EVALUATION[name]) for name in sorted(wanted)}
    if most_tests and found[Metric.NUM_EXAMPLES] > most_tests:
        raise Refused("bad figure", f"{found['num-examples']} examples; there are {most_tests}")
    if settings.task.kind == "causal-lm" and "accuracy" in wanted:
        found |= _groups(record, int(found[Metric.NUM_EXAMPLES]))
    return found


def at_most(metrics: Metrics, examples: float) -> Metrics:
    """An evaluation that counts as of so many examples at most, in all its groups alike."""
    ratio = examples / metrics[Metric.NUM_EXAMPLES]
    if ratio >= 1:
        return metrics
    fewer = {
        name: max(1, int(value * ratio))
        for name, value in metrics.items()
        if name == Metric.NUM_EXAMPLES or name.endswith(Metric.GROUP_EXAMPLES)
    }
    return {**metrics, **fewer}


def expected_figures(settings: RunSettings) -> tuple[str, ...]:
    """Figures that every client's evaluation has."""
    task = settings.task
    if task.kind == "causal-lm":
        return ("loss",) if task.evaluate == "loss" else ("loss", "accuracy", "low", "high")
    usual = ("pearson", "spearman") if task.problem == "regression" else DEFAULT
    return ("loss", *(split_list(task.metrics) or usual))


def _groups(record: Mapping[str, object], examples: int) -> dict[str, int | float]:
    """Figures of groups of examples, each of them whole; together of no more than all examples."""
    found: dict[str, int | float] = {}
    groups = sorted(
        {name.rpartition(".")[0] for name in record if name.endswith(Metric.GROUP_EXAMPLES)}
    )
    if len(groups) > MOST_GROUPS:
        raise Refused("bad figure", f"{len(groups)} groups of examples; expected {MOST_GROUPS}")
    for group in groups:
        if not group or one_line(group, 64) != group:
            raise Refused("bad figure", f"group {shown(group)} has no plain name")
        for part, bounds in OF_GROUP.items():
            name = f"{group}.{part}"
            if name not in record:
                raise Refused("bad figure", f"the evaluation lacks {name}")
            found[name] = _figure(name, record[name], bounds)
    if sum(int(found[f"{group}{Metric.GROUP_EXAMPLES}"]) for group in groups) > examples:
        raise Refused("bad figure", "its groups have more examples than the evaluation")
    return found


def _check_origin(reply: Message, round_: int, run: str) -> None:
    origin = reply.content.config_records.get(ORIGIN)
    if origin is None:
        raise Refused("wrong round", "the reply does not say which round and run it is of")
    if origin.get("round") != round_ or origin.get("run") != run:
        raise Refused(
            "wrong round",
            f"an update of round {shown(origin.get('round'))}, run {shown(origin.get('run'))}; "
            f"this is round {round_} of {run}",
        )


def _given(assignment: Assignment, metrics: Metrics) -> Adapter:
    """The start that the reply's shapes refer to, with the rank that the client fell back to."""
    if Metric.RANK_CAP not in metrics:
        return assignment.given
    cap = int(metrics[Metric.RANK_CAP])
    ranks = {module: min(rank, cap) for module, rank in assignment.given.ranks.items()}
    return assignment.given.cut(ranks)


def _arrays(record: ArrayRecord, expected: Mapping[str, Tensor], wire_type: WireType) -> Arrays:
    """Arrays of just the names, types and sizes that are expected; views of what came."""
    wanted = layout(expected, wire_type)
    missing, foreign = set(wanted) - set(record), set(record) - set(wanted)
    if missing or foreign:
        parts = []
        if missing:
            parts.append(f"lacks {min(missing)} ({len(missing)} missing)")
        if foreign:
            name = one_line(min(foreign), _NAME)
            parts.append(f"holds unasked {name} ({len(foreign)} foreign)")
        raise Refused("wrong names", "update " + " and ".join(parts))
    arrays: Arrays = {}
    for name, expectation in wanted.items():
        array = record[name]
        if array.stype != "numpy.ndarray":
            raise Refused("bad arrays", f"{name} is serialised as {shown(array.stype)}")
        try:
            arrays[name] = read_npy(array.data, expectation)
        except WireError as error:
            raise Refused("bad arrays", f"{name}: {error}") from error
    return arrays


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
