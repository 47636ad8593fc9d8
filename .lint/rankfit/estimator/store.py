"""Traces on disk, for the next process: one file per step spec and library versions."""

import hashlib
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from rankfit.estimator.solve import StepFamily
from rankfit.estimator.spec import StepSpec

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
