"""The examples of a run: read from scikit-learn, local files or the hub, with integer labels.

Inputs stay as they are read (text, images not yet decoded); the task encodes them. Before, every
record goes once through what training does with it: a label is a class or a number, and the input
is read, decoded, rendered and encoded. One that cannot be used is refused by name, or counted and
left out. What was found is kept in a cache, so that the processes of a simulation and later runs
on unchanged files do not repeat it.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from rankfit.configs.settings import RunSettings, derive, split_list, split_names
from rankfit.tasks.prompts import as_passage, task_of
from rankfit.tasks.readers import Columns, find_part, find_test, hub_parts, read_table
from rankfit.tasks.records import (
    EVERYTHING,
    Access,
    DataError,
    Fault,
    Raw,
    Reading,
    RecordError,
    Rows,
    assign,
    is_number,
    keep_first,
    name_classes,
    plain,
    report_skipped,
    select,
    wrong_label,
)
from rankfit.tasks.tables import ENDINGS

__all__ = ["DataError", "Dataset", "Examples", "known_labels", "read_data"]

log = logging.getLogger(__name__)

#: Encodes inputs as training would; an exception says that one of them cannot be.
Encode = Callable[[Sequence[Any], Reading | None], object]

#: Inputs that are encoded together, as long as none is wrong.
_TOGETHER = 64
#: What decides how an input is encoded, beside the data.
_PACKAGES = ("transformers", "tokenizers", "pillow", "datasets")
_KEPT_FILES = 200


_INPUT_COLUMNS = {
    "image-classification": ("image", "img", "file_name", "path"),
    "text-classification": ("text",),
}
_DIGITS = "sklearn:digits"
_DIGITS_MAXIMUM = 16.0
_MISSING = "data-missing"


@dataclass(frozen=True)
class Examples:
    """Inputs and their labels.

    Attributes
    ----------
    inputs : sequence
        As they were read.
    labels : NDArray
        Class of each, int64 of shape (n,); of a regression, its target rounded, so that it can be
        dealt like a class.
    targets : NDArray or None
        Targets of a regression, float32 of shape (n,).
    groups : NDArray or None
        Value of ``partition.column`` of each, as text, of shape (n,).
    reading : Reading or None
        How records of language data are read.
    """

    inputs: Sequence[Any]
    labels: NDArray[np.int64]
    targets: NDArray[np.float32] | None = None
    groups: NDArray[np.str_] | None = None
    reading: Reading | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test set over the same classes.

    ``holdout`` is taken from the training set, to choose the best round by; empty where none is.
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    holdout: Examples


def known_labels(settings: RunSettings) -> int | None:
    """Number of outputs if the settings alone decide it, without a look at the data."""
    if settings.task.problem == "regression":
        return 1
    names = split_names(settings.data.class_names)
    if names:
        return settings.data.classes or len(names)
    return settings.data.classes or None


def read_data(
    settings: RunSettings,
    *,
    data_path: str | None = None,
    encode: Encode | None = None,
    model: str = "",
    access: Access = EVERYTHING,
) -> Dataset:
    """Read both sets, and refuse or leave out what cannot be used.

    Without a test set, ``data.test-fraction`` of the training set is held out, stratified by class
    and drawn from the seed. A node's own files are held out from only where clients evaluate.

    Parameters
    ----------
    settings
        What to read, and how labels become ids.
    data_path
        A node's own file or folder, in place of ``data.source``.
    encode, model
        What training does with inputs, and its fingerprint; see :func:`records.screen`.
    access
        What of the machine's data may be read.

    Raises
    ------
    DataError
        If something is missing, empty, or cannot be a label.
    """
    train, test = _read_parts(settings, data_path, access)
    train = screen(_labelled(train, settings), settings, encode, model)
    if test is not None:
        test = screen(_labelled(test, settings), settings, encode, model)
    names = name_classes(settings, train, test)
    train_set = _examples(train, names, settings)
    if test is not None:
        test_set = _examples(test, names, settings)
    elif data_path is not None and settings.server.evaluate != "clients":
        test_set = _select(train_set, np.arange(0))
    else:
        fraction = settings.data.test_fraction
        train_set, test_set = _hold_out(
            train_set, settings, "data.test-fraction", fraction, "hold-out"
        )
    holdout = _select(train_set, np.arange(0))
    if settings.best.held_out and data_path is None:  # a node trains on all of its own files
        share = settings.best.held_out
        train_set, holdout = _hold_out(train_set, settings, "best.holdout", share, "best-holdout")
    kept = names[: settings.data.classes] if settings.data.classes else names
    return Dataset(
        _draw(train_set, settings.data.train_samples, derive(settings.run.seed, "train-samples")),
        _draw(test_set, settings.data.test_samples, derive(settings.run.seed, "test-samples")),
        kept,
        holdout,
    )


def _labelled(raw: Raw, settings: RunSettings) -> Raw:
    """Make labels of text numbers for a regression, and names of groups for language data.

    Commonsense records are named by their answers, where the data does not name them.
    """
    if settings.task.problem == "regression":
        return replace(raw, labels=[_as_number(label) for label in raw.labels])
    if settings.task.kind != "causal-lm":
        return raw
    if raw.names is None:
        raw = replace(
            raw, labels=["" if wrong_label(label) else str(plain(label)) for label in raw.labels]
        )
    if settings.task.suite != "commonsense" or any(raw.labels):
        return raw
    return replace(raw, labels=[task_of(record) for record in raw.inputs])


def _as_number(label: Any) -> Any:
    """The number that a text is; anything else as it is."""
    try:
        return float(label) if isinstance(label, str) else label
    except ValueError:
        return label


def _draw(examples: Examples, count: int, seed: int) -> Examples:
    """Keep ``count`` examples (0 = all)."""
    if not count or count >= len(examples):
        return examples
    rows = np.random.default_rng(seed).choice(len(examples), count, replace=False)
    return _select(examples, np.sort(rows))


def _read_parts(
    settings: RunSettings, data_path: str | None, access: Access
) -> tuple[Raw, Raw | None]:
    """Read the training part, and the test part where there is one."""
    data, kind = settings.data, settings.task.kind
    source = data.source if data_path is None else data_path
    if source.startswith("sklearn:"):
        return _digits(source, kind), None
    columns = _columns(settings, access)
    place = Path(source).expanduser()
    if place.is_file():
        return read_table([place], str(place), columns, data), None
    if place.is_dir():
        if data.name and data_path is None and (place / data.name).is_dir():
            place = place / data.name  # a copy of a hub repository, one configuration of it
        return _folder_parts(place, source, columns, settings)
    if data_path is not None or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise DataError(f"data {source!r}: there is no such file or folder", fault=_MISSING)
    log.info("data.source %r: nothing of that name here, so it is taken from the hub", source)
    return hub_parts(data, columns)


def _folder_parts(
    place: Path, source: str, columns: Columns, settings: RunSettings
) -> tuple[Raw, Raw | None]:
    """Read the parts of a folder, or of the only folder in it."""
    data = settings.data
    train = find_part(place, data.train, columns, data)
    if train is None:
        inside = [item for item in place.iterdir() if not item.name.startswith((".", "__MACOSX"))]
        if len(inside) == 1 and inside[0].is_dir():
            return _folder_parts(inside[0], source, columns, settings)
        raise DataError(
            f"data folder {source!r}: nothing matches data.train {data.train!r}; it holds "
            f"{', '.join(sorted(item.name for item in place.iterdir())[:8]) or 'nothing'} (files "
            f"that can be read end in {', '.join(ENDINGS)})",
            fault=_MISSING,
        )
    test = find_test(place, columns, data)
    if test is None and data.test not in ("", "test"):
        raise DataError(
            f"data folder {source!r}: nothing matches data.test {data.test!r}", fault=_MISSING
        )
    return train, test


def _columns(settings: RunSettings, access: Access) -> Columns:
    data, kind, group = settings.data, settings.task.kind, settings.partition.column
    if kind == "causal-lm":
        return Columns((), data.label_column, records=True, group=group, access=access)
    own = split_list(data.input_column)
    return Columns(
        own or _INPUT_COLUMNS[kind],
        data.label_column,
        images=kind == "image-classification",
        pairs=len(own) > 1,
        group=group,
        access=access,
    )


def _digits(source: str, kind: str) -> Raw:
    if source != _DIGITS or kind != "image-classification":
        raise DataError(
            f"data.source {source!r} for {kind}: expected {_DIGITS!r} for image-classification",
            fault=_MISSING,
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / _DIGITS_MAXIMUM).astype(np.float32)  # (1797, 8, 8), in [0, 1]
    names = tuple(str(name) for name in digits.target_names)
    return Raw(source, images, digits.target.tolist(), names)


def _examples(raw: Raw, names: Sequence[str], settings: RunSettings) -> Examples:
    targets = None
    groups = None if raw.groups is None else np.array([str(value) for value in raw.groups])
    if settings.task.problem == "regression":
        targets = np.array(raw.labels, dtype=np.float32)
        labels = np.rint(targets).astype(np.int64)
        kept = np.arange(len(labels))
    else:
        skip = settings.data.bad_records == "skip"
        labels = assign(raw, names, skip=skip)
        report_skipped(raw.origin, int((labels < 0).sum()), "a label that is no class")
        kept = keep_first(labels, settings.data.classes, len(names))
        others = int((labels >= 0).sum()) - len(kept)
        report_skipped(raw.origin, others, f"labels beyond data.classes {settings.data.classes}")
    if not len(kept):
        raise DataError(f"data {raw.origin}: the set is empty", fault="data-empty")
    return _select(Examples(raw.inputs, labels, targets, groups, raw.reading), kept)


def _select(examples: Examples, rows: NDArray[np.int64]) -> Examples:
    if len(rows) == len(examples):
        return examples
    return Examples(
        Rows(examples.inputs, rows),
        examples.labels[rows],
        None if examples.targets is None else examples.targets[rows],
        None if examples.groups is None else examples.groups[rows],
        examples.reading,
    )


def _hold_out(
    examples: Examples, settings: RunSettings, key: str, fraction: float, purpose: str
) -> tuple[Examples, Examples]:
    """Cut the share that the setting ``key`` asks for off a set, drawn for one purpose."""
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            np.arange(len(examples)),
            test_size=fraction,
            random_state=derive(settings.run.seed, purpose) % 2**32,
            stratify=examples.labels if _classifies(settings) else None,
        )
    except ValueError as error:
        raise DataError(
            f"{key} {fraction}: {len(examples)} examples of "
            f"{len(np.unique(examples.labels))} classes cannot be split with every class on both "
            f"sides ({error}); give more examples, or set another share",
            fault="data-split",
        ) from error
    return _select(examples, np.sort(train)), _select(examples, np.sort(test))


def _classifies(settings: RunSettings) -> bool:
    return settings.task.kind != "causal-lm" and settings.task.problem == "classification"


# Screening


def screen(raw: Raw, settings: RunSettings, encode: Encode | None = None, model: str = "") -> Raw:
    """Leave out what cannot be used, if ``data.bad-records`` is ``skip``.

    Parameters
    ----------
    encode
        What training does with inputs (None = they are only looked at).
    model
        Fingerprint of what encodes them; "" = what is found is not kept.

    Raises
    ------
    RecordError
        For the first record that cannot be used, if the setting is ``refuse``.
    """
    skip = settings.data.bad_records == "skip"
    place = _cache(raw, settings, model) if encode is not None and model else None
    wrong = _load(place)
    if wrong is None:
        wrong = _search(raw, settings, encode, stop=not skip)
        if not wrong or skip:
            _save(place, wrong)
    if wrong and not skip:
        row, (what, fault) = min(wrong.items())
        raise RecordError(raw.origin, row, what, fault)
    report_skipped(raw.origin, len(wrong), "content that cannot be used")
    if not wrong:
        return raw
    kept = [row for row in range(len(raw.labels)) if row not in wrong]
    if not kept:
        row, (what, fault) = min(wrong.items())
        raise DataError(
            f"data {raw.origin}: the set is empty: none of {len(raw.labels)} records can be used; "
            f"row {row} {what}"
        )
    return select(raw, kept)


Wrong = dict[int, tuple[str, Fault]]


def _search(raw: Raw, settings: RunSettings, encode: Encode | None, *, stop: bool) -> Wrong:
    """Rows that cannot be used, and why; with ``stop``, the first."""
    wrong: Wrong = {}
    rows = iter(range(len(raw.labels)))
    while part := list(islice(rows, _TOGETHER)):
        inputs: dict[int, Any] = {}
        for row in part:
            label = _wrong_label(raw.labels[row], settings)
            if label:
                wrong[row] = (label, "label")
                continue
            try:
                inputs[row] = raw.inputs[row]
                unusable = _wrong_input(inputs[row], raw, settings)
            except Exception as error:  # noqa: BLE001 - whatever a decoder raises for a broken file
                unusable = f"cannot be read: {_line(error)}"
            if unusable:
                wrong[row] = (unusable, "input")
                inputs.pop(row, None)
        if encode is not None and inputs:
            wrong |= _not_encoded(inputs, encode, raw.reading)
        if wrong and stop:
            break
    return wrong


def _not_encoded(inputs: dict[int, Any], encode: Encode, reading: Reading | None) -> Wrong:
    """Rows that cannot be encoded: tried together, and one by one where that fails."""
    try:
        encode(list(inputs.values()), reading)
        return {}
    except Exception:  # noqa: BLE001 - the one that is at fault is looked for below
        pass
    wrong: Wrong = {}
    for row, value in inputs.items():
        try:
            encode([value], reading)
        except Exception as error:  # noqa: BLE001 - training would fail by it, whatever it is
            what = str(error) if isinstance(error, DataError) else (
                f"cannot be encoded: {_line(error)}"
            )  # fmt: skip
            wrong[row] = (what, "encoding")
    return wrong


def _line(error: Exception) -> str:
    """First line of an error."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def _wrong_label(label: Any, settings: RunSettings) -> str:
    if settings.task.kind == "causal-lm":
        return ""  # it only groups records
    if settings.task.problem == "classification":
        return wrong_label(label)
    return "" if is_number(label) else f"has label {label!r}, expected a number"


def _wrong_input(value: Any, raw: Raw, settings: RunSettings) -> str:
    if settings.task.kind == "image-classification":
        return "holds no image" if value is None else ""
    if settings.task.kind == "causal-lm":
        try:
            as_passage(value, settings, raw.reading)
        except ValueError as error:
            return str(error)
        return ""
    texts = value if isinstance(value, tuple) else (value,)
    bad = next((part for part in texts if not isinstance(part, str)), "")
    return "" if isinstance(bad, str) else f"holds {bad!r}, expected text"


# What was found, kept between processes: numbers of rows and words, nothing of the records.


def _cache(raw: Raw, settings: RunSettings, model: str) -> Path | None:
    """File that holds what was found in the same content by the same means; None = none can."""
    content = raw.fingerprint()
    if not content:
        return None
    means = {
        "content": content,
        "model": model,
        "task": settings.task.model_dump(mode="json"),
        "data": settings.data.model_dump(mode="json", exclude={"source"}),
        "packages": [version(name) for name in _PACKAGES],
        "code": _own_code(),
        "reading": None if raw.reading is None else dict(raw.reading.columns),
    }
    name = hashlib.sha256(json.dumps(means, sort_keys=True).encode()).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rankfit"
    folder = base / "screened"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for own in (base, folder):
            found = own.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                return None
        os.chmod(folder, 0o700)
        return folder / f"{name}.json"
    except OSError:
        return None


@cache
def _own_code() -> str:
    """Hash of the modules that read, render and encode: what one refuses, the last may not have."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _load(place: Path | None) -> Wrong | None:
    try:
        found = json.loads(place.read_text("utf-8")) if place is not None else None
        if not isinstance(found, dict) or not set(found.values()) <= set(get_args(Fault)):
            return None
        return {int(row): ("was found unusable before", fault) for row, fault in found.items()}
    except (OSError, ValueError):
        return None


def _save(place: Path | None, wrong: Wrong) -> None:
    if place is None:
        return
    new = place.with_suffix(f".{os.getpid()}")
    try:
        new.write_text(json.dumps({row: fault for row, (_, fault) in wrong.items()}), "utf-8")
        new.replace(place)
        files = sorted(place.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in files[:-_KEPT_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.info("what is unusable in the data cannot be kept in %s: %s", place.parent, error)
