"""What the owner of a node allows runs to do on it: a TOML file beside the SuperNode.

The node config's ``policy`` names the file. A node without one has the defaults below: named data
sets and models, no folder of the machine but the node config's ``data-path``, no code from the hub,
writing only below the SuperNode's working directory. docs/security.md tells what this guards.
"""

import fnmatch
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from rankfit.configs.faults import Faulty
from rankfit.configs.learning import Count, NonNegative, Table
from rankfit.configs.protocol import Metric
from rankfit.configs.settings import OWNER, ConfigError, RunSettings, Scalar, split_list
from rankfit.tasks.records import Access

MIB = 2**20
_ANY = ("*",)
Patterns = tuple[str, ...]
#: What clients keep from round to round.
Kept = Literal["heads", "moments"]


class NotAllowed(Faulty, RuntimeError):
    """Something that the node's policy does not allow."""

    code = "node-policy"


class PolicyError(ConfigError):
    """A policy file that cannot be read."""

    code = "node-policy"


class DataPolicy(Table):
    """What may be read."""

    #: Beside the node config's ``data-path``. Links that lead out of them are not followed.
    folders: Patterns = ()
    #: Data sets that are no folders of this machine, ids of the hub as ``hub:ID``.
    sources: Patterns = ("sklearn:*", "hub:*")
    columns: Patterns = _ANY
    minimum_samples: Count = 0


class ModelPolicy(Table):
    """Which base models may be loaded."""

    #: As ``model.source`` has them; ids of the hub as ``hub:ID``, folders and configs by path.
    sources: Patterns = ("builtin:*", "package:*", "hub:*")
    revisions: Patterns = _ANY
    #: Beginnings of the fingerprints that the worker logs.
    fingerprints: Patterns = _ANY
    remote_code: bool = False


class WritePolicy(Table):
    """Where heads and moments may be kept."""

    folders: Patterns = (".",)


class WorkPolicy(Table):
    """How much one message may ask for (0 = no limit)."""

    epochs: Count = 100
    steps: Count = 100_000
    minutes: NonNegative = 24 * 60.0
    memory_mib: NonNegative = 0.0


class Policy(Table):
    """A node's policy; patterns are those of a shell (``*``, ``?``)."""

    #: Let the texts of errors out, which may hold what the data holds.
    texts: bool = False
    #: Names of the figures that may leave; ``num-examples`` always does.
    figures: Patterns = _ANY
    data: DataPolicy = DataPolicy()
    model: ModelPolicy = ModelPolicy()
    write: WritePolicy = WritePolicy()
    work: WorkPolicy = WorkPolicy()

    @classmethod
    def of_node(cls, node_config: Mapping[str, Scalar]) -> "Policy":
        """The policy of a node.

        Raises
        ------
        PolicyError
            If the file is not there or not a policy: nothing is allowed then.
        """
        named = str(node_config.get("policy", ""))
        if named == OWNER or (not named and _simulated()):
            return everything()
        return cls.read(Path(named).expanduser()) if named else cls()

    @classmethod
    def read(cls, file: Path) -> "Policy":
        """Read a policy file; raises :class:`PolicyError`."""
        try:
            return cls.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PolicyError(f"policy {file}: cannot be read: {error}") from error
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
                for item in error.errors()
            )
            raise PolicyError(f"policy {file}: {wrong}") from error

    @property
    def memory_bytes(self) -> int | None:
        """Device memory that may be used; None = all."""
        return round(self.work.memory_mib * MIB) or None

    def check(self, settings: RunSettings, data_path: str | None) -> None:
        """Refuse a run that asks for what is not allowed; the first such thing.

        Raises
        ------
        NotAllowed
        """
        for refusal in self.refusals(settings, data_path):
            raise refusal

    def refusals(self, settings: RunSettings, data_path: str | None) -> Iterable[NotAllowed]:
        """All that a run asks for and is not allowed, as far as settings tell."""
        yield from self._model(settings)
        yield from self._data(settings, data_path)
        yield from self._work(settings)
        for kind in kept_kinds(settings):
            root = kept_folder(settings, kind)
            if not _within(root, self.write.folders):
                yield NotAllowed(
                    f"{kind} in {str(root)!r}: the policy's write.folders are "
                    f"{', '.join(self.write.folders) or 'none'}",
                    fault="policy-write",
                )

    def access(self, data_path: str | None) -> Access:
        """What of this machine's data may be read."""
        folders = [*self.data.folders, *([data_path] if data_path is not None else [])]
        real = None if "*" in folders else tuple(_real(folder) for folder in folders)
        return Access(real, self.data.columns, label_names=self.texts)

    def check_samples(self, count: int) -> None:
        """Refuse to train on too few samples, which an update could tell of."""
        if count < self.data.minimum_samples:
            raise NotAllowed(
                f"{count} samples; the policy's data.minimum-samples is "
                f"{self.data.minimum_samples}",
                fault="policy-samples",
            )

    def check_fingerprint(self, fingerprint: str) -> None:
        """Refuse a base model that is not among those allowed."""
        if not any(
            fnmatch.fnmatchcase(fingerprint, f"{each}*") for each in self.model.fingerprints
        ):
            raise NotAllowed(
                f"base model {fingerprint[:12]} is not among the policy's model.fingerprints",
                fault="policy-model",
            )

    def check_plan(self, peak_bytes: int) -> None:
        """Refuse a plan that takes more memory than is allowed."""
        most = self.memory_bytes
        if most is not None and peak_bytes > most:
            raise NotAllowed(
                f"a plan of {peak_bytes / MIB:.0f} MiB; the policy's work.memory-mib is "
                f"{self.work.memory_mib:g}",
                fault="policy-memory",
            )

    def later(self) -> Iterable[str]:
        """What is checked when a message comes, or while it is served."""
        if self.model.fingerprints != _ANY:
            yield f"the base model's fingerprint begins with {' or '.join(self.model.fingerprints)}"
        if self.data.minimum_samples:
            yield f"at least {self.data.minimum_samples} samples"
        if self.work.memory_mib:
            yield f"at most {self.work.memory_mib:g} MiB of device memory"
        if self.work.minutes:
            yield f"at most {self.work.minutes:g} minutes of one training"
        if self.figures != _ANY:
            yield f"of the figures, {', '.join(self.figures) or 'none'} and num-examples leave"

    def let_out(self, metrics: Mapping[str, int | float]) -> dict[str, int | float]:
        """The figures that may leave."""
        return {
            name: value
            for name, value in metrics.items()
            if name == Metric.NUM_EXAMPLES or _matches(name, self.figures)
        }

    def _model(self, settings: RunSettings) -> Iterable[NotAllowed]:
        model = settings.model
        if model.trust_remote_code and not self.model.remote_code:
            yield NotAllowed("model.trust-remote-code: not allowed here", fault="policy-code")
        named = _named_model(model.source)
        if not _matches(named, self.model.sources):
            yield NotAllowed(
                f"model.source {model.source!r} is not among the policy's model.sources: "
                f"{', '.join(self.model.sources) or 'none'}",
                fault="policy-model",
            )
        if named.startswith("hub:") and not _matches(model.revision, self.model.revisions):
            yield NotAllowed(
                f"model.revision {model.revision!r} is not among the policy's model.revisions: "
                f"{', '.join(self.model.revisions) or 'none'}",
                fault="policy-model",
            )

    def _data(self, settings: RunSettings, data_path: str | None) -> Iterable[NotAllowed]:
        data, source = settings.data, settings.data.source
        if data_path is None:
            if _is_path(source):
                allowed = _within(Path(source), self.data.folders)
            else:
                known = source if ":" in source else f"hub:{source}"
                allowed = _matches(known, self.data.sources)
            if not allowed:
                yield NotAllowed(
                    f"data.source {source!r}: the policy's data.folders are "
                    f"{', '.join(self.data.folders) or 'none'}, its data.sources "
                    f"{', '.join(self.data.sources) or 'none'}",
                    fault="policy-data",
                )
        for key, text in (
            ("data.input-column", data.input_column),
            ("data.label-column", data.label_column),
            ("partition.column", settings.partition.column),
        ):
            for column in split_list(text):
                # A column that may be absent, and is by the policy, is not there.
                optional = key == "data.label-column" and settings.task.kind == "causal-lm"
                if not optional and not _matches(column, self.data.columns):
                    yield NotAllowed(
                        f"{key} {column!r} is not among the policy's data.columns",
                        fault="policy-columns",
                    )

    def _work(self, settings: RunSettings) -> Iterable[NotAllowed]:
        train, most = settings.train, self.work
        if most.steps and train.steps > most.steps:
            yield NotAllowed(
                f"train.steps {train.steps} is above the policy's work.steps {most.steps}",
                fault="policy-work",
            )
        if most.epochs and not train.steps and train.epochs > most.epochs:
            yield NotAllowed(
                f"train.epochs {train.epochs} is above the policy's work.epochs {most.epochs}",
                fault="policy-work",
            )


def kept_kinds(settings: RunSettings) -> list[Kept]:
    """What a run lets clients keep in files."""
    wanted: dict[Kept, bool] = {
        "heads": settings.head.mode == "local",
        "moments": settings.train.moments == "kept",
    }
    return [kind for kind, kept in wanted.items() if kept]


def kept_folder(settings: RunSettings, kind: Kept) -> Path:
    """Folder that a run names for what its clients keep."""
    if kind == "heads" and settings.head.directory:
        return Path(settings.head.directory).expanduser()
    return Path(settings.run.directory).expanduser() / settings.run.name / kind


def everything() -> Policy:
    """The policy of who runs a simulation on data of their own: all is allowed, and shown."""
    return Policy(
        texts=True,
        data=DataPolicy(folders=_ANY, sources=_ANY),
        model=ModelPolicy(sources=_ANY, remote_code=True),
        write=WritePolicy(folders=_ANY),
        work=WorkPolicy(epochs=0, steps=0, minutes=0.0),
    )


def _simulated() -> bool:
    """Whether this process is one of Ray's, as which Flower runs the clients of a simulation.

    Nothing that comes over a network can make it one: a SuperNode starts no Ray.
    """
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _matches(name: str, patterns: Patterns) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_path(source: str) -> bool:
    """Whether a source is a file or folder here, or could be none else (``tasks.data``)."""
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return True
    return ":" not in source and Path(source).exists()


def _named_model(source: str) -> str:
    """A model source as policies name it."""
    scheme, _, rest = source.partition(":")
    if scheme in ("builtin", "package"):
        return source
    if scheme == "config":
        return str(_real(rest))
    return str(_real(source)) if _is_path(source) else f"hub:{source}"


def _within(path: Path, folders: Patterns) -> bool:
    """Whether a path, its links followed, lies in one of the folders."""
    if "*" in folders:
        return True
    return any(_real(path).is_relative_to(_real(folder)) for folder in folders)


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(Path(path).expanduser()))
