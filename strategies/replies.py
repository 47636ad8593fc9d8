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
from rankfit.adapters.delta import Prints
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
from rankfit.configs.learning import CLASS_METRICS, NUMBER_METRICS
from rankfit.configs.settings import RunSettings, split_list
from rankfit.estimator.device_report import DeviceReport, one_line, shown
from rankfit.estimator.plan import Plan
from rankfit.strategies import messages
from rankfit.tasks.metrics import DEFAULT

Metrics = Mapping[str, int | float]

#: Largest number in an update, and in what is merged of updates (whose factors are those of
#: products): far above any that training gives, and its squares and products stay in float32.
LARGEST_VALUE, LARGEST_MERGED = 1e5, 1e9
#: Most samples that are believed of one client, and most nodes that share a data set.
MOST_SAMPLES, MOST_PARTITIONS = 10**12, 10**6
#: Groups of examples (tasks of a suite) that one client's evaluation may name.
MOST_GROUPS = 256
#: Characters of a reason, and of a name in it.
_REASON, _NAME = 300, 120

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


@dataclass(frozen=True)
class Figure:
    """A number that clients may send: whole or not, and its range."""

    whole: bool
    least: float
    most: float

    def read(self, name: str, value: object) -> int | float:
        """The number, or a refusal."""
        right = not isinstance(value, bool) and isinstance(value, int | float)
        if not right or not self.least <= value <= self.most:  # type: ignore[operator]
            raise Refused(
                "bad figure",
                f"{name} is {shown(value)}; expected {self.least:g} to {self.most:g}",
            )
        if self.whole and value != int(value):  # type: ignore[call-overload]
            raise Refused("bad figure", f"{name} is {shown(value)}; expected a whole number")
        return int(value) if self.whole else float(value)  # type: ignore[call-overload,arg-type]


#: Figures of a training, by name; any other is left out. ``score.MODULE`` is read beside them.
TRAINING: Mapping[str, Figure] = {
    "num-examples": Figure(True, 1, MOST_SAMPLES),
    "train-loss": Figure(False, -1e30, 1e30),
    "steps": Figure(True, 0, 10**9),
    "learning-rate": Figure(False, 0, 1e6),
    "peak-memory-bytes": Figure(True, 0, 2**50),
    "train-seconds": Figure(False, 0, 1e8),
    "out-of-memory": Figure(True, 0, 64),
    "micro-batch": Figure(True, 1, 10**6),
    "rank-cap": Figure(True, 1, 10**6),
    "pruned": Figure(True, 0, 1),
}
SCORE, SCORES = "score.", Figure(False, 0, 1e30)
_SHARE, _SIGNED, _LOSS = Figure(False, 0, 1), Figure(False, -1, 1), Figure(False, 0, 1e30)
#: Ranges of an evaluation's figures.
EVALUATION: Mapping[str, Figure] = {
    **dict.fromkeys((*CLASS_METRICS, "low", "high"), _SHARE),
    **dict.fromkeys((*NUMBER_METRICS, "mcc"), _SIGNED),
    **dict.fromkeys(("mse", "loss"), _LOSS),
    "num-examples": Figure(True, 1, MOST_SAMPLES),
}
#: Figures of a group of examples.
_OF_GROUP = {"accuracy": _SHARE, "low": _SHARE, "high": _SHARE}
_OF_GROUP["examples"] = Figure(True, 1, MOST_SAMPLES)


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
    prints : Prints
        Hashes of what it holds once it has answered.
    """

    client: str
    node_id: int
    plan: Plan
    given: Adapter
    download_bytes: int
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    prints: Prints = field(default_factory=dict)


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


def read_failure(reply: Message) -> Failure:
    """Why a reply carries an error; its text is cleaned and cut."""
    try:
        found = messages.fault(reply)
        text = messages.failure(reply)
    except Exception as error:  # noqa: BLE001 - see total
        found, text = None, f"an error that cannot be read ({type(error).__name__})"
    # Not even its smallest fall-back fitted.
    lost = found is not None and found.code == "memory-out"
    code = f" ({found.code})" if found is not None else ""
    kind = "out of memory" if lost else f"client error{code}"
    return Failure(kind, one_line(text, _REASON), lost)


@total
def read_report(reply: Message) -> DeviceReport:
    """The device report in a reply to :data:`rankfit.strategies.messages.QUERY`."""
    if reply.has_error():
        failure = read_failure(reply)
        raise Refused(failure.kind, failure.reason)
    record = reply.content.config_records.get("device")
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
    record = reply.content.config_records.get("client", ConfigRecord())
    return record.get("worker", False) is True


def partitions(reply: Message) -> int:
    """Nodes that the sender of this reply to the query shares a data set with; 0 = none."""
    if reply.has_error():
        return 0
    found = reply.content.config_records.get("client", ConfigRecord()).get("partitions", 0)
    return found if type(found) is int and 0 < found <= MOST_PARTITIONS else 0


def upload_bytes(reply: Message) -> int:
    """Bytes of the numbers in the arrays of a reply, as they came."""
    if reply.has_error():
        return 0
    record = reply.content.array_records.get("adapter", ArrayRecord())
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
    record = reply.content.metric_records.get("metrics", MetricRecord())
    plan, found = assignment.plan, dict[str, int | float]()
    loss = record.get("train-loss")
    for name, figure in TRAINING.items():
        if name not in record or (name == "train-loss" and not _finite(loss)):
            continue
        found[name] = figure.read(name, record[name])
    if "num-examples" not in found:
        raise Refused("bad figure", "num-examples is 0; expected at least 1")
    for name, most in (("rank-cap", plan.rank), ("micro-batch", plan.micro_batch)):
        if found.get(name, 0) > most:
            raise Refused("bad figure", f"{name} is {found[name]}; the plan has {most}")
    pruned, lost = found.get("pruned", 0), found.get("out-of-memory", 0)
    if pruned and ("prune" not in plan.extras or "rank-cap" not in found):
        raise Refused("bad figure", "it pruned its rank, unasked or without a rank-cap")
    if "rank-cap" in found and not (pruned or lost):
        raise Refused("bad figure", "rank-cap without having pruned or run out of memory")
    if "scores" in plan.extras:
        scores = {f"{SCORE}{module}" for module in assignment.given.factors}
        found |= {n: SCORES.read(n, record[n]) for n in sorted(scores & set(record))}
    return found


@total
def read_update(
    reply: Message, assignment: Assignment, metrics: Metrics, wire_type: WireType
) -> Update:
    """The update of a reply, at the number of samples that it names.

    A client that ran out of memory may have lowered its rank; it says so in ``rank-cap``, and its
    factors are then those of the first ``rank-cap`` directions.
    """
    record = reply.content.array_records.get("adapter", ArrayRecord())
    given = _given(assignment, metrics)
    expected = given.moving(assignment.plan.moves)
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
    return Update(given, trained, float(metrics["num-examples"]), indices)


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
    record = reply.content.metric_records.get("metrics", MetricRecord())
    wanted = {"num-examples", *expected_figures(settings)}
    missing = sorted(wanted - set(record))
    if missing:
        raise Refused("bad figure", f"the evaluation lacks {missing[0]}")
    found = {name: EVALUATION[name].read(name, record[name]) for name in sorted(wanted)}
    if most_tests and found["num-examples"] > most_tests:
        raise Refused("bad figure", f"{found['num-examples']} examples; there are {most_tests}")
    if settings.task.kind == "causal-lm" and "accuracy" in wanted:
        found |= _groups(record, int(found["num-examples"]))
    return found


def at_most(metrics: Metrics, examples: float) -> Metrics:
    """An evaluation that counts as of so many examples at most, in all its groups alike."""
    ratio = examples / metrics["num-examples"]
    if ratio >= 1:
        return metrics
    fewer = {
        name: max(1, int(value * ratio))
        for name, value in metrics.items()
        if name == "num-examples" or name.endswith(".examples")
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
    groups = sorted({name.rpartition(".")[0] for name in record if name.endswith(".examples")})
    if len(groups) > MOST_GROUPS:
        raise Refused("bad figure", f"{len(groups)} groups of examples; expected {MOST_GROUPS}")
    for group in groups:
        if not group or one_line(group, 64) != group:
            raise Refused("bad figure", f"group {shown(group)} has no plain name")
        for part, figure in _OF_GROUP.items():
            name = f"{group}.{part}"
            if name not in record:
                raise Refused("bad figure", f"the evaluation lacks {name}")
            found[name] = figure.read(name, record[name])
    if sum(int(found[f"{group}.examples"]) for group in groups) > examples:
        raise Refused("bad figure", "its groups have more examples than the evaluation")
    return found


def _check_origin(reply: Message, round_: int, run: str) -> None:
    origin = reply.content.config_records.get("update")
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
    if "rank-cap" not in metrics:
        return assignment.given
    cap = int(metrics["rank-cap"])
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
