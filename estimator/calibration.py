"""What a trace cannot know: terms of libraries and driver, GPU profiles, and corrections."""

import logging
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low
from typing import Any, Self

import tomli_w

from rankfit.configs.settings import ConfigError
from rankfit.estimator.device_report import DeviceReport

MIB = 2**20


@dataclass(frozen=True)
class Term:
    """One calibration term: its value in bytes (or as a factor) and where it comes from."""

    name: str
    value: int
    source: str


#: The one table of values; :class:`Calibration` picks from it.
TERMS = {
    term.name: term
    for term in (
        Term(
            "cublas-workspace-sm90",
            32 * MIB,
            "fits HRALoRA's profiled DeiT-small on H100; torch's default for sm90; one for the "
            "forward and one for the backward thread",
        ),
        Term(
            "cublas-workspace",
            8_519_680,
            "torch's default CUBLAS_WORKSPACE_CONFIG :4096:2:16:8, one per thread",
        ),
        Term("attention-scratch", 1, "kernel sources of flash and efficient attention backward"),
        Term("cuda-context", 470 * MIB, "reports of 430 MB; until measured by NVML"),
        Term(
            "nccl-communicator",
            688 * MIB,
            "github.com/NVIDIA/nccl/issues/964: all-reduce of 4 A100s (544 of 2); a group's only",
        ),
    )
}


@dataclass(frozen=True)
class Calibration:
    """The terms for one device; ``dataclasses.replace`` overrides a term.

    Attributes
    ----------
    cublas_workspace : int
        Bytes of one cuBLAS workspace; the forward and the backward thread hold one each.
    attention_scratch : int
        Times the scratch bytes of attention's backward kernel (0 = leave it out).
    context : int
        Bytes of the CUDA context, outside the allocator.
    communicator : int
        Bytes that NCCL takes, outside the allocator, where several GPUs train together.
    """

    cublas_workspace: int = 0
    attention_scratch: int = 0
    context: int = 0
    communicator: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"calibration {name} is {value}; expected bytes of 0 or more")

    @classmethod
    def of(cls, report: DeviceReport) -> Self:
        """Terms for a device; a CPU has none. ``CUBLAS_WORKSPACE_CONFIG`` is honoured."""
        if report.accelerator == "cpu":
            return cls()
        return cls.cuda(report.compute_capability, report.group_size).measured(report)

    def measured(self, report: DeviceReport) -> Self:
        """The terms with the context that the device's own process was measured to take."""
        return self if report.context_bytes < 0 else replace(self, context=report.context_bytes)

    @property
    def outside(self) -> int:
        """Bytes outside the allocator."""
        return self.context + self.communicator

    @classmethod
    def cuda(cls, compute_capability: str = "", group_size: int = 1) -> Self:
        """Terms for a GPU of a compute capability ("9.0"; "" = not known), alone or in a group."""
        sm90 = compute_capability.partition(".")[0] == "9"
        default = TERMS["cublas-workspace-sm90" if sm90 else "cublas-workspace"].value
        configured = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return cls(
            cublas_workspace=default if configured is None else workspace_bytes(configured),
            attention_scratch=TERMS["attention-scratch"].value,
            context=TERMS["cuda-context"].value,
            communicator=TERMS["nccl-communicator"].value if group_size > 1 else 0,
        )


def workspace_bytes(config: str) -> int:
    """Bytes of ``:SIZE:COUNT[:SIZE:COUNT…]``, sizes in KiB, as cuBLAS and torch read it.

    Raises
    ------
    ValueError
        If the text is not of that form.
    """
    if config == ":0:0":
        return 0
    if not re.fullmatch(r"(:\d+:\d+)+", config):
        raise ValueError(
            f"CUBLAS_WORKSPACE_CONFIG is {config!r}; expected :SIZE:COUNT pairs such as :4096:8"
        )
    numbers = [int(text) for text in config.split(":")[1:]]
    return sum(s * c * 1024 for s, c in zip(numbers[::2], numbers[1::2], strict=True))


#: Term → field of :class:`Calibration`.
_FIELDS = {
    "cublas-workspace": "cublas_workspace",
    "cublas-workspace-sm90": "cublas_workspace",
    "attention-scratch": "attention_scratch",
    "cuda-context": "context",
    "nccl-communicator": "communicator",
}


@dataclass(frozen=True)
class Profile:
    """Terms that replace those of the table, for devices of one kind.

    Attributes
    ----------
    name, compute_capability : str
        Of the GPUs that it holds for; "" = any.
    terms : Mapping[str, Term]
        By the names of :data:`~rankfit.estimator.calibration.TERMS`.
    """

    name: str = ""
    compute_capability: str = ""
    terms: Mapping[str, Term] = field(default_factory=dict)

    def calibration(self, report: DeviceReport) -> Calibration:
        """Terms for a device: the table's, with those of this profile in their place."""
        terms = Calibration.of(report)
        if not self.covers(report):
            return terms
        sm90 = report.compute_capability.partition(".")[0] == "9"
        for name, term in self.terms.items():
            if name == ("cublas-workspace" if sm90 else "cublas-workspace-sm90"):
                continue
            if name == "nccl-communicator" and report.group_size == 1:
                continue
            terms = replace(terms, **{_FIELDS[name]: term.value})
        return terms.measured(report)

    def covers(self, report: DeviceReport) -> bool:
        """Whether the profile holds for a device; never for a CPU."""
        return (
            report.accelerator == "cuda"
            and self.name in ("", report.name)
            and self.compute_capability in ("", report.compute_capability)
        )

    @classmethod
    def load(cls, path: str) -> Self:
        """Read a profile; "" = none, the table's terms everywhere.

        Raises
        ------
        ConfigError
            If the file cannot be read, or a term is unknown or no number of bytes.
        """
        if not path:
            return cls()
        try:
            record = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"plan.calibration {path!r} cannot be read: {error}") from error
        terms = {name: _term(path, name, entry) for name, entry in record.get("terms", {}).items()}
        return cls(str(record.get("name", "")), str(record.get("compute-capability", "")), terms)

    def save(self, path: Path) -> None:
        """Write the profile, so that it can be edited by hand."""
        terms = {n: {"value": t.value, "source": t.source} for n, t in self.terms.items()}
        record = {"name": self.name, "compute-capability": self.compute_capability, "terms": terms}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(record), encoding="utf-8")


def _term(path: str, name: str, entry: Any) -> Term:
    if name not in TERMS:
        raise ConfigError(
            f"plan.calibration {path!r}: unknown term {name!r}; expected one of {', '.join(TERMS)}"
        )
    value = entry.get("value") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(
            f"plan.calibration {path!r}: the value of {name} is {value!r}; expected a whole number "
            "of bytes, 0 or more"
        )
    return Term(name, value, str(entry.get("source", "set by hand")))


log = logging.getLogger(__name__)

#: Corrections are whole multiples of it, and an excess of less than one is none: what a step takes
#: varies by some hundred bytes of counters, and two runs of one seed must make the same plans.
GRAIN = 16 * 1024


def kind_of(report: DeviceReport) -> str:
    """Kind of device whose errors are alike: accelerator, product, compute capability."""
    return " ".join((report.accelerator, report.name, report.compute_capability)).strip()


class Corrections:
    """How far measured peaks were above their estimates, by kind of device and by client.

    Only an excess is kept: a peak below the estimate means that the data were shorter than the
    largest batch, not that the device needs less. A client keeps free the most that it measured
    itself. What others of its kind measured counts by their median (the lower of two), so that no
    one of them can move another's plan: two must have measured an excess.
    """

    def __init__(self) -> None:
        #: By kind, the largest excess of each client; 0 = measured, and within the estimate.
        self._excess: dict[str, dict[str, int]] = {}

    def extra_bytes(self, report: DeviceReport) -> int:
        """Bytes to keep free on a device beside its estimate."""
        known = self._excess.get(kind_of(report), {})
        others = [excess for client, excess in known.items() if client != report.client]
        usual = median_low(others) if len(others) > 1 else 0
        return max(known.get(report.client, 0), min(usual, report.total_bytes))

    def learn(self, report: DeviceReport, expected_bytes: int, measured_bytes: int) -> None:
        """Take in the measured peak of one update that trained its whole plan.

        An excess counts up to all the memory of the device.
        """
        excess, kind = min(measured_bytes - expected_bytes, report.total_bytes), kind_of(report)
        excess = -(-excess // GRAIN) * GRAIN if excess >= GRAIN else 0
        known = self._excess.setdefault(kind, {})
        if excess > known.get(report.client, -1):
            known[report.client] = excess
            if excess:
                log.info(
                    "%s (%s) takes up to %.2f MiB above its estimate, which is kept free from now "
                    "on", report.client, kind, excess / 2**20,
                )  # fmt: skip

    def forget(self, report: DeviceReport) -> None:
        """Drop what a client measured: its estimate counts another context from now on."""
        self._excess.get(kind_of(report), {}).pop(report.client, None)

    def state(self) -> dict[str, dict[str, int]]:
        """What was learned, for the checkpoint."""
        return {kind: dict(own) for kind, own in self._excess.items()}

    def restore(self, state: Mapping[str, Mapping[str, int] | int]) -> None:
        """Take over what an interrupted run had learned."""
        self._excess = {
            # Of an older release there is one figure for all clients of a kind: none is named.
            kind: {c: int(v) for c, v in own.items()} if isinstance(own, Mapping) else {}
            for kind, own in state.items()
        }
