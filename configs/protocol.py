"""What server and clients say to each other: messages, their records, keys, units and bounds.

=====================  =================================  ====================================
message                the server sends                   the client answers
=====================  =================================  ====================================
``QUERY``              nothing; or ``LINK``, or a         ``DEVICE``, ``CLIENT``; the payload
                       payload whose time is taken        that ``LINK`` asks for
``FINISH``             nothing: the run is over           nothing
``TRAIN``              ``ADAPTER``, ``PLAN``; ``DELTA``   ``ADAPTER`` (what moved), ``METRICS``,
                       where parts are left out           ``ORIGIN``
``EVALUATE``           ``ADAPTER``, ``PLAN``              ``METRICS``
=====================  =================================  ====================================

``DEVICE`` is a :class:`rankfit.estimator.device_report.DeviceReport`; ``PLAN`` is an
:class:`Instruction`, in a training with a :class:`rankfit.estimator.plan.Plan`; arrays are those of
:mod:`rankfit.adapters.wire`. Where a client cannot answer, Flower's error reply holds a
:class:`rankfit.configs.faults.Fault`. No key of a message is written anywhere else. This module
knows neither Flower nor torch, so that every side of a message can import it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self, cast

from rankfit.configs.learning import CLASS_METRICS, NUMBER_METRICS

# Messages, as Flower names their types.
QUERY: Final = "query.capabilities"
FINISH: Final = "query.finish"
TRAIN: Final = "train"
EVALUATE: Final = "evaluate"

# Records of their contents.
ADAPTER: Final = "adapter"
PLAN: Final = "plan"
DELTA: Final = "delta"
METRICS: Final = "metrics"
ORIGIN: Final = "origin"
DEVICE: Final = "device"
CLIENT: Final = "client"
LINK: Final = "link"
PAYLOAD: Final = "payload"

Value = str | int | float | bool | list[str] | list[int]

#: Most samples that are believed of one client, and most nodes that share a data set.
MOST_SAMPLES, MOST_PARTITIONS = 10**12, 10**6
#: Groups of examples (tasks of a suite) that one client's evaluation may name.
MOST_GROUPS = 256
#: Largest payload that a client sends for a measurement of its link, in bytes.
MOST_PAYLOAD = 64 * 2**20


@dataclass(frozen=True)
class Instruction:
    """What a training or an evaluation is of: the ``PLAN`` record of its message.

    Attributes
    ----------
    round : int
        Round of the run, from 1.
    run : str
        Identity of the run: an update of another one is not merged.
    client : str
        Name of the client; seeds derive from it.
    scale : float
        Scale of the adapter's products.
    fingerprint : str
        Of the base model: a client that has another one refuses.
    precision : str
        Of the frozen base: fp32, bf16, fp16, int8 or nf4.
    plan : Mapping[str, Value]
        The plan's own keys; for an evaluation only ``precision``.
    """

    round: int
    run: str
    client: str
    scale: float
    fingerprint: str
    precision: str
    plan: Mapping[str, Value] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """One flat record: the plan's keys beside these."""
        return {
            **self.plan,
            "round": self.round,
            "run": self.run,
            "client": self.client,
            "scale": self.scale,
            "fingerprint": self.fingerprint,
            "precision": self.precision,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Self:
        """Inverse of :meth:`to_dict`; raises ``KeyError`` for a missing key."""
        own = ("round", "run", "client", "scale", "fingerprint")
        return cls(
            round=cast(int, record["round"]),
            run=str(record["run"]),
            client=str(record["client"]),
            scale=cast(float, record["scale"]),
            fingerprint=str(record["fingerprint"]),
            precision=str(record["precision"]),
            plan={k: cast(Value, v) for k, v in record.items() if k not in own},
        )

    @property
    def origin(self) -> dict[str, Any]:
        """Which training an update is of: the ``ORIGIN`` record of the answer."""
        return {"round": self.round, "run": self.run}


@dataclass(frozen=True)
class ClientState:
    """The ``CLIENT`` record: how this client works in this run.

    Attributes
    ----------
    worker : bool
        Whether a process of the client stays for more messages.
    partitions : int
        Nodes that share a data set with it; 0 = it has files of its own.
    """

    worker: bool
    partitions: int

    def to_dict(self) -> dict[str, Any]:
        """The record."""
        return {"worker": self.worker, "partitions": self.partitions}

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Self:
        """Whatever came, as a state: what is not one is as if nothing had been said."""
        partitions = record.get("partitions", 0)
        usable = type(partitions) is int and 0 < partitions <= MOST_PARTITIONS
        return cls(record.get("worker", False) is True, cast(int, partitions) if usable else 0)


@dataclass(frozen=True)
class LinkProbe:
    """The ``LINK`` record: asks for a payload of so many bytes, at most :data:`MOST_PAYLOAD`."""

    reply_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The record."""
        return {"reply-bytes": self.reply_bytes}

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Self:
        """Inverse of :meth:`to_dict`, within the bounds."""
        return cls(min(max(int(cast(int, record["reply-bytes"])), 0), MOST_PAYLOAD))


class Metric:
    """Names of what clients measure, in the ``METRICS`` record."""

    #: Samples trained or evaluated on: the weight of an update.
    NUM_EXAMPLES: Final = "num-examples"
    #: Mean loss over the samples seen; absent where it is not finite.
    TRAIN_LOSS: Final = "train-loss"
    #: Optimizer steps.
    STEPS: Final = "steps"
    LEARNING_RATE: Final = "learning-rate"
    #: Largest device memory of the training, in bytes.
    PEAK_MEMORY_BYTES: Final = "peak-memory-bytes"
    TRAIN_SECONDS: Final = "train-seconds"
    #: How often memory ran out before a smaller plan was trained.
    OUT_OF_MEMORY: Final = "out-of-memory"
    #: Samples of a forward pass after that.
    MICRO_BATCH: Final = "micro-batch"
    #: Rank that was trained in the plan's place: the first directions of what was given.
    RANK_CAP: Final = "rank-cap"
    #: 1 where the client pruned its own rank (HetLoRA).
    PRUNED: Final = "pruned"
    #: Before a module's name: its importance (Fisher information, nuclear norm, …).
    SCORE: Final = "score."
    #: Behind a group's name: examples of a group in an evaluation.
    GROUP_EXAMPLES: Final = ".examples"


def one_line(text: str, most: int) -> str:
    """A client's text as it may be written and shown: printable characters on one line.

    Control and format characters (line breaks, escape sequences, changes of direction) become
    blanks, blanks in a row become one, and what is longer than ``most`` characters is cut.
    """
    kept = "".join(c if c.isprintable() else " " for c in text[: 8 * most])
    line = " ".join(kept.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def shown(value: object) -> str:
    """A client's value for an error message, whatever it is and however large."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a whole number of more than 20 digits"
    return one_line(repr(value if not isinstance(value, str) else value[:200]), 60)


class OutOfRange(ValueError):
    """A figure that is no number, or not within its bounds."""


@dataclass(frozen=True)
class Bounds:
    """What a figure may be.

    Attributes
    ----------
    kind : {"whole", "real"}
        Whether only whole numbers are right.
    least, most : float
        Smallest and largest value.
    """

    kind: Literal["whole", "real"]
    least: float
    most: float

    def read(self, name: str, value: object) -> int | float:
        """The number; raises :class:`OutOfRange` for anything else."""
        right = not isinstance(value, bool) and isinstance(value, int | float)
        if not right or not self.least <= value <= self.most:  # type: ignore[operator]
            raise OutOfRange(f"{name} is {shown(value)}; expected {self.least:g} to {self.most:g}")
        if self.kind == "real":
            return float(value)  # type: ignore[arg-type]
        if value != int(value):  # type: ignore[call-overload]
            raise OutOfRange(f"{name} is {shown(value)}; expected a whole number")
        return int(value)  # type: ignore[call-overload,no-any-return]


#: Figures of a training; any other is left out. :data:`Metric.SCORE` is read beside them.
TRAINING: Mapping[str, Bounds] = {
    Metric.NUM_EXAMPLES: Bounds("whole", 1, MOST_SAMPLES),
    Metric.TRAIN_LOSS: Bounds("real", -1e30, 1e30),
    Metric.STEPS: Bounds("whole", 0, 10**9),
    Metric.LEARNING_RATE: Bounds("real", 0, 1e6),
    Metric.PEAK_MEMORY_BYTES: Bounds("whole", 0, 2**50),
    Metric.TRAIN_SECONDS: Bounds("real", 0, 1e8),
    Metric.OUT_OF_MEMORY: Bounds("whole", 0, 64),
    Metric.MICRO_BATCH: Bounds("whole", 1, 10**6),
    Metric.RANK_CAP: Bounds("whole", 1, 10**6),
    Metric.PRUNED: Bounds("whole", 0, 1),
}
SCORES = Bounds("real", 0, 1e30)
_SHARE, _SIGNED, _LOSS = Bounds("real", 0, 1), Bounds("real", -1, 1), Bounds("real", 0, 1e30)
#: Figures of an evaluation.
EVALUATION: Mapping[str, Bounds] = {
    **dict.fromkeys((*CLASS_METRICS, "low", "high"), _SHARE),
    **dict.fromkeys((*NUMBER_METRICS, "mcc"), _SIGNED),
    **dict.fromkeys(("mse", "loss"), _LOSS),
    Metric.NUM_EXAMPLES: Bounds("whole", 1, MOST_SAMPLES),
}
#: Figures of a group of examples in an evaluation, behind ``GROUP.``.
OF_GROUP: Mapping[str, Bounds] = {
    **dict.fromkeys(("accuracy", "low", "high"), _SHARE),
    Metric.GROUP_EXAMPLES.removeprefix("."): Bounds("whole", 1, MOST_SAMPLES),
}
