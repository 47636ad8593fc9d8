"""The tracer: from a step spec to its trace, in about a second, and the caches of traces."""

import hashlib
import logging
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from rankfit.estimator.depth import solve_deep
from rankfit.estimator.recording import collector_paused
from rankfit.estimator.step_spec import StepSpec
from rankfit.estimator.trace import StepFamily, Trace, TraceError, solve

log = logging.getLogger(__name__)

#: Changes with the meaning of what is kept.
FORMAT = 3


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/rankfit/traces``, or the same under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "rankfit" / "traces"


class TraceStore:
    """Folder of traces. A file that cannot be read is made again, and a full disk costs a warning.

    Parameters
    ----------
    folder : Path, optional
        Default: :func:`default_folder`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder

    def read(self, name: str, spec: StepSpec) -> StepFamily | None:
        """Return what is kept under a name by these versions of the libraries."""
        path = self._path(name)
        try:
            with np.load(path, allow_pickle=False) as kept:
                return StepFamily(
                    spec=spec,
                    operators=kept["operators"].tolist(),
                    column=kept["column"],
                    amount=kept["amount"],
                    sampled=kept["sampled"],
                    events=kept["events"],
                    phases=kept["phases"].tolist(),
                    trained=kept["trained"],
                    state=kept["state"],
                )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            log.warning("trace %s cannot be read and is made again: %s", path, error)
            return None

    def write(self, name: str, family: StepFamily) -> None:
        """Keep a family, atomically: another process never reads half a file."""
        path = self._path(name)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.savez_compressed(
                    file,
                    operators=np.array(family.operators),
                    column=family.column,
                    amount=family.amount,
                    sampled=family.sampled,
                    events=family.events,
                    phases=np.array(family.phases),
                    trained=family.trained,
                    state=family.state,
                )
            part.replace(path)
        except OSError as error:
            log.warning("trace is not kept in %s: %s", path.parent, error)

    def _path(self, name: str) -> Path:
        libraries = (torch.__version__, transformers.__version__, peft.__version__)
        versions = "-".join((str(FORMAT), *libraries))
        digest = hashlib.sha256(versions.encode()).hexdigest()[:12]
        return self.folder / f"{name}-{digest}.npz"


__all__ = ["StepFamily", "TraceCache", "TraceError", "solve", "trace"]

#: Micro-batches of the two recordings. A micro-batch of 1 is recorded for itself: with a dimension
#: of 1, tensors are contiguous that otherwise are copied.
BATCHES = (2, 3)


class TraceCache:
    """Traces by step spec: what costs a second once costs nothing for the next client.

    Parameters
    ----------
    store : TraceStore, optional
        Keeps them on disk too, for the next process.
    """

    def __init__(self, store: TraceStore | None = None) -> None:
        self._store = store
        self._traces: dict[str, Trace] = {}
        self._families: dict[str, StepFamily | None] = {}

    def __call__(self, spec: StepSpec) -> Trace:
        """Return the trace of a spec, made at the first call.

        Raises
        ------
        TraceError
            If the step has no closed form.
        ModelError
            If the model cannot be built or adapted.
        """
        if spec.key not in self._traces:
            family = self._linear(spec) if spec.micro_batch > 1 else None
            if family is None:
                family = self._family(spec, (spec.micro_batch, spec.micro_batch))
            self._traces[spec.key] = family.at(spec.micro_batch)
        return self._traces[spec.key]

    def _linear(self, spec: StepSpec) -> StepFamily | None:
        """Return the step at all micro-batches; None where bytes are not linear in it."""
        key = replace(spec, micro_batch=BATCHES[0]).key
        if key not in self._families:
            try:
                self._families[key] = self._family(replace(spec, micro_batch=BATCHES[0]), BATCHES)
            except TraceError:
                self._families[key] = None
        return self._families[key]

    def _family(self, spec: StepSpec, batches: tuple[int, int]) -> StepFamily:
        name = f"{spec.key}-{batches[0]}-{batches[1]}"
        if self._store is not None:
            kept = self._store.read(name, spec)
            if kept is not None:
                return kept
        with collector_paused():  # a tenth of the time
            family = solve_deep(spec, batches)
        if self._store is not None:
            self._store.write(name, family)
        return family


def trace(spec: StepSpec) -> Trace:
    """Trace one step at its own micro-batch alone, at its full depth.

    Raises
    ------
    TraceError
        If a storage is not proportional to one rank, or the events differ between ranks.
    ModelError
        If the model cannot be built or adapted.
    """
    return solve(spec, (spec.micro_batch, spec.micro_batch)).at(spec.micro_batch)
