"""Calibration profiles: terms measured on one kind of GPU, or set by hand, in a TOML file.

``rankfit calibrate`` writes one; ``plan.calibration`` names the file that a run or estimate uses.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import tomli_w

from rankfit.configs.settings import ConfigError
from rankfit.estimator.calibration import TERMS, Calibration, Term
from rankfit.estimator.report import DeviceReport

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
        return terms

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
