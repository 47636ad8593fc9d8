"""The run directory: settings, plans, rounds, events, checkpoints, and how a run resumes."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rankfit.adapters.adapter import Adapter
from rankfit.configs.compose import compose, without_places
from rankfit.configs.settings import ConfigError, RunSettings, to_flat
from rankfit.server.evaluation import Evaluator
from rankfit.server.lock import RunLock
from rankfit.server.reporting import PARTITION
from rankfit.tasks import load_task
from rankfit.tasks.base_model import load_base, shared_heads
from rankfit.tasks.records import DataError
from rankfit.tasks.task import Task

log = logging.getLogger(__name__)

#: Complete checkpoints kept: the newest, and one to go back to.
KEPT = 2
#: PEFT's file names.
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STATE = "run_state.json"
#: Link to the checkpoint of the best round.
BEST = "best"
#: Checksums of the other files, for `sha256sum -c`.
SUMS = "SHA256SUMS"
#: Tensors of the strategy's state, and the adapter where another one is exported.
TENSORS = "run_state.safetensors"
_OWN = "adapter/"
#: What the system says where a disk, a quota or a file is full.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_TASK_TYPES = {
    "text-classification": "SEQ_CLS",
    "image-classification": None,
    "causal-lm": "CAUSAL_LM",
}


class StorageError(RuntimeError):
    """A run directory that cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round: all that is needed to go on.

    Attributes
    ----------
    round : int
        Rounds that are done.
    adapter : Adapter
        Global adapter that training goes on from.
    strategy, tensors : Mapping
        State of the strategy: what JSON holds, and tensors by name.
    exported : Adapter or None
        What is saved for use in the adapter's place (a moving average, or with what was folded
        into the base); None = the adapter itself.
    best : Mapping
        State of the best round so far (``BestRound``); {} where none is chosen.
    """

    round: int
    adapter: Adapter
    strategy: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    exported: Adapter | None = None
    best: Mapping[str, Any] = field(default_factory=dict)


class RunDirectory:
    """Files of one run.

    Parameters
    ----------
    settings : RunSettings
        The run; ``run.directory/run.name`` is its folder.

    Raises
    ------
    ConfigError
        If the folder holds a run already and ``run.resume`` is off, or holds none and it is on, or
        a resumed run's settings differ in what decides its figures.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.path = Path(settings.run.directory).expanduser().resolve() / settings.run.name
        config = self.path / "config.toml"
        if config.exists() and not settings.run.resume:
            raise ConfigError(
                f"{self.path} holds a run already: give another run.name, or run.resume=true to "
                "continue it"
            )
        if settings.run.resume:
            self._check_same(config)
        self._lock = RunLock(self.path)

    def open(self) -> Checkpoint | None:
        """Take the lock and read where a run that resumes goes on; None = from the start.

        Raises
        ------
        ConfigError
            If another process writes this run, or no checkpoint is whole.
        StorageError
            If the folder cannot be written.
        """
        if not self.settings.run.resume:
            return None
        with _storing(self.path):
            self._lock.take()
        try:
            return self.load()
        except BaseException:
            self._lock.release()
            raise

    def create(self) -> None:
        """Make the folder, with the settings in it. Called when the run is sure to start."""
        with _storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
        if not self.settings.run.resume and (self.path / "config.toml").exists():
            raise ConfigError(f"{self.path} holds a run already, begun a moment ago")
        with _storing(self.path):
            _write_atomically(
                self.path / "config.toml", tomli_w.dumps(nest(to_flat(self.settings)))
            )

    def close(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def append_plans(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to ``plans.jsonl``."""
        _append(self.path / "plans.jsonl", lines)

    def append_round(self, line: Mapping[str, Any]) -> None:
        """Add a line to ``rounds.jsonl``."""
        _append(self.path / "rounds.jsonl", [line])

    def rounds(self) -> list[dict[str, Any]]:
        """All lines of ``rounds.jsonl``."""
        return _read(self.path / "rounds.jsonl")

    def save(self, checkpoint: Checkpoint, heads: Iterable[str]) -> Path:
        """Write a checkpoint in PEFT's format and make it the newest.

        Parameters
        ----------
        checkpoint : Checkpoint
            Adapter at the global rank, and the strategy's state.
        heads : Iterable[str]
            Modules that are trained whole (PEFT's ``modules_to_save``).

        Raises
        ------
        StorageError
            If it cannot be written; those before are left as they are.
        """
        with _storing(self.path):
            return self._save(checkpoint, heads)

    def _save(self, checkpoint: Checkpoint, heads: Iterable[str]) -> Path:
        folder = self.path / "checkpoints"
        final = folder / f"round-{checkpoint.round:05d}"
        partial = folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_adapter(partial, checkpoint.exported or checkpoint.adapter, self.settings, heads)
        tensors = dict(checkpoint.tensors)
        if checkpoint.exported is not None:
            tensors |= {_OWN + n: t for n, t in checkpoint.adapter.state_dict().items()}
        if tensors:
            save_file({n: t.contiguous().clone() for n, t in tensors.items()}, partial / TENSORS)
        state = {"round": checkpoint.round, "scale": checkpoint.adapter.scale, "sums": SUMS}
        state |= {"best": checkpoint.best} if checkpoint.best else {}
        (partial / STATE).write_text(
            json.dumps(state | {"strategy": checkpoint.strategy}, indent=1), encoding="utf-8"
        )
        sums = [f"{_sum(file)}  {file.name}\n" for file in sorted(partial.iterdir())]
        (partial / SUMS).write_text("".join(sums), encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
        self._link("checkpoint", final)
        self._link_best(checkpoint.best)
        rounds = kept_rounds(self.path)
        # Also the best round of the older one, to which a run goes back if the newest is damaged.
        best = {_best_folder(self.path, _state(folder).get("best", {})) for folder in rounds[:KEPT]}
        for old in rounds[KEPT:]:
            if old not in best:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def load(self) -> Checkpoint | None:
        """Read the newest whole checkpoint, None if no round is done, and drop later rounds' lines.

        Raises
        ------
        ConfigError
            If rounds are done and no checkpoint is whole: the run cannot go on, and does not begin
            anew by itself.
        """
        folder = newest_whole(self.path)
        for newer in kept_rounds(self.path):
            if newer == folder:
                break
            aside = newer.with_name(f"damaged-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
        if folder is None:
            done = max((line["round"] for line in self.rounds()), default=0)
            done = max([done, *(_number(f) for f in (self.path / "checkpoints").glob("*-round-*"))])
            if done > 0:
                raise ConfigError(
                    f"cannot resume {self.path}: {done} rounds are done, and no whole checkpoint "
                    "is left; put one back into checkpoints/, or start a new run"
                )
            log.warning("%s: no round was done; the run begins", self.path)
            self._truncate(-1)
            return None
        tensors = load_file(folder / TENSORS) if (folder / TENSORS).exists() else {}
        own = {n.removeprefix(_OWN): t for n, t in tensors.items() if n.startswith(_OWN)}
        state = _state(folder)
        adapter = Adapter.from_state_dict(own or load_file(folder / WEIGHTS), state["scale"])
        with _storing(self.path):
            self._truncate(state["round"])
            self._link("checkpoint", folder)
            self._link_best(state.get("best", {}))
        kept = {n: t for n, t in tensors.items() if not n.startswith(_OWN)}
        return Checkpoint(
            state["round"], adapter, state["strategy"], kept, best=state.get("best", {})
        )

    def _link_best(self, best: Mapping[str, Any]) -> None:
        """Point ``best`` at the best round so far, where one is chosen."""
        folder = _best_folder(self.path, best)
        if folder is None:
            (self.path / BEST).unlink(missing_ok=True)
        else:
            self._link(BEST, folder)

    def _link(self, name: str, target: Path) -> None:
        """Point a name in the run directory at a folder in one step."""
        fresh = self.path / f".{name}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target.relative_to(self.path), target_is_directory=True)
        os.replace(fresh, self.path / name)
        _flush(self.path)

    def _truncate(self, last_round: int) -> None:
        for name in ("rounds.jsonl", "plans.jsonl"):
            file = self.path / name
            if file.exists():
                kept = [line for line in _read(file) if line["round"] <= last_round]
                text = "".join(json.dumps(line) + "\n" for line in kept)
                if text != file.read_text(encoding="utf-8", errors="replace"):
                    _write_atomically(file, text)

    def _check_same(self, config: Path) -> None:
        if not config.exists():
            raise ConfigError(f"run.resume is on, but {config.parent} holds no run")
        import tomllib

        # A setting that a newer release has added was at its default.
        saved = flatten(tomllib.loads(config.read_text(encoding="utf-8")))
        before = to_flat(RunSettings()) | saved
        free = {"run.resume", "run.rounds", "run.directory", "server.evaluate-batch-size"}
        free |= {"best.patience", "run.report-to"}
        for key, value in to_flat(self.settings).items():
            if key not in free and before[key] != value:
                raise ConfigError(
                    f"cannot resume {config.parent}: {key} was {before[key]!r}, is {value!r}; "
                    "set it back, or start a new run"
                )


def kept_rounds(path: Path) -> list[Path]:
    """Checkpoints of a run directory, the newest first."""
    found = (path / "checkpoints").glob("round-*")
    return sorted((f for f in found if _number(f) >= 0), key=_number, reverse=True)


def newest_whole(path: Path) -> Path | None:
    """Newest checkpoint that is whole; a line says which newer ones are passed over, and why."""
    for folder in kept_rounds(path):
        wrong = damage(folder)
        if not wrong:
            return folder
        log.warning("checkpoint %s is damaged (%s): going back to the one before", folder, wrong)
    return None


def _state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; {} where that cannot be read."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _best_folder(path: Path, best: Mapping[str, Any]) -> Path | None:
    """Checkpoint of the best round; None where none is chosen yet."""
    return path / "checkpoints" / f"round-{best['round']:05d}" if best.get("round") else None


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; "" = nothing. Those of older releases have no checksums."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["round"] != _number(folder) or not (folder / WEIGHTS).is_file():
            return f"it is not that of round {_number(folder)}"
        if not (folder / SUMS).exists():
            load_file(folder / WEIGHTS)
            return "" if "sums" not in state else f"{SUMS} is missing"
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: found for found, _, name in (line.partition("  ") for line in lines)}
        for name in {*expected, *(file.name for file in folder.iterdir())} - {SUMS}:
            if _sum(folder / name) != expected.get(name):
                return f"the checksum of {name} is another"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def write_adapter(
    folder: Path, adapter: Adapter, settings: RunSettings, heads: Iterable[str]
) -> None:
    """Write an adapter so that ``PeftModel.from_pretrained(base, folder)`` loads it."""
    state = {name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    rank = max(adapter.ranks.values())
    # PEFT reads a pattern as a regular expression that may match the end of a name.
    patterns = {f"^{re.escape(m)}": own for m, own in adapter.ranks.items() if own != rank}
    LoraConfig(
        r=rank,
        lora_alpha=adapter.scale * rank,
        rank_pattern=patterns,
        alpha_pattern={pattern: adapter.scale * own for pattern, own in patterns.items()},
        target_modules=sorted(adapter.factors),
        lora_dropout=settings.lora.dropout,
        modules_to_save=sorted(heads) or None,
        task_type=_TASK_TYPES[settings.task.kind],
        base_model_name_or_path=without_places(settings).model.source,
        inference_mode=True,
    ).save_pretrained(str(folder))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into tables, for TOML."""
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    return tables


def flatten(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`nest`."""
    return {f"{t}.{k}": value for t, keys in tables.items() for k, value in keys.items()}


def _number(folder: Path) -> int:
    """Round of a checkpoint's folder; −1 for another folder."""
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdecimal() else -1


def _sum(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Say what a failure to write means."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(_cannot_write(path, error)) from error


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Say it of a full disk alone: not every error of a run is one of writing."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise StorageError(_cannot_write(path, error)) from error


def _cannot_write(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be written: {error}. No finished round is lost: make room, and go on "
        f"with `rankfit resume {path}`"
    )


def _append(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with _storing(file.parent), file.open("a", encoding="utf-8") as out:
        for line in lines:
            out.write(json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _read(file: Path) -> list[dict[str, Any]]:
    """Lines of a JSON-lines file; a last line cut off by a crash is left out."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            log.warning("%s: an incomplete line is left out", file)
    return lines


def _write_atomically(file: Path, text: str) -> None:
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    _flush(fresh)
    os.replace(fresh, file)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _best_number(path: Path, newest: Path | None, number: int | None) -> int:
    """Round that the newest checkpoint calls the best."""
    if number is not None:
        raise ConfigError(f"round {number} and the best one: name one of them")
    best = _state(newest).get("best", {}) if newest else {}
    if not best.get("round"):
        raise ConfigError(
            f"{path} has no best round: it ran without best.metric, or no round gave that figure"
        )
    return int(best["round"])


@dataclass(frozen=True)
class SavedRun:
    """A run that was trained.

    Attributes
    ----------
    path : Path
        The run directory.
    settings : RunSettings
        As it ran, with what the caller changed.
    round : int
        Of the checkpoint.
    adapter : Adapter
        What the checkpoint holds for use: the exported adapter.
    identity : str
        Of the run (empty before its first round, and in runs of older releases).
    """

    path: Path
    settings: RunSettings
    round: int
    adapter: Adapter
    identity: str

    @classmethod
    def open(
        cls,
        directory: Path,
        number: int | None = None,
        overrides: Sequence[str] = (),
        *,
        best: bool = False,
    ) -> "SavedRun":
        """Read a run.

        Parameters
        ----------
        number : int, optional
            Round of the checkpoint (None = the newest).
        overrides : sequence of str
            ``table.key=value`` over the run's settings.
        best : bool
            The best round by ``best.metric``, in place of a number.

        Raises
        ------
        ConfigError
            If there is no run or no such checkpoint.
        """
        path = Path(directory).expanduser().resolve()
        if not (path / "config.toml").is_file():
            raise ConfigError(f"{path} holds no run: there is no config.toml in it")
        place = [f"run.directory={path.parent}", f"run.name={path.name}"]
        settings = compose([str(path / "config.toml"), *place, *overrides])
        folder = newest_whole(path)
        if best:
            number = _best_number(path, folder, number)
        if number is not None:
            folder = path / "checkpoints" / f"round-{number:05d}"
        if folder is None or damage(folder):
            kept = [item.name for item in reversed(kept_rounds(path)) if not damage(item)]
            raise ConfigError(
                f"{path} has no whole checkpoint{'' if number is None else f' of round {number}'}; "
                f"there are: {', '.join(kept) or 'none'}"
            )
        state = _state(folder)
        adapter = Adapter.from_state_dict(load_file(folder / WEIGHTS), state["scale"])
        identity = state["strategy"].get("identity", "")
        return cls(path, settings, state["round"], adapter, identity)

    @cached_property
    def task(self) -> Task:
        """The run's task."""
        return load_task(self.settings)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the model's outputs by id; () where there are none or none are known.

        Where the data is no longer at hand, those that the run has noted.
        """
        if self.settings.task.kind == "causal-lm" or self.settings.task.problem == "regression":
            return ()
        try:
            return self.task.output_names
        except DataError:
            file = self.path / PARTITION
            return tuple(json.loads(file.read_text())["classes"]) if file.is_file() else ()

    @cached_property
    def base(self) -> PreTrainedModel:
        """The run's base model."""
        return load_base(self.settings, self.task.labels, self.class_names)

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Modules that were trained whole and are part of the adapter."""
        return shared_heads(self.base, self.settings.head)

    def evaluator(self) -> Evaluator:
        """Measures adapters on the run's task; takes over the base."""
        return Evaluator(self.settings, self.task, self.base, self.heads)

    def lines(self) -> list[dict[str, Any]]:
        """Lines of ``rounds.jsonl`` up to the checkpoint."""
        file = self.path / "rounds.jsonl"
        texts = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        lines = [json.loads(text) for text in texts]
        return [line for line in lines if line["round"] <= self.round]
