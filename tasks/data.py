"""The examples of a run, with integer labels: the same label has the same id in every set."""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfit.configs.settings import RunSettings, derive, split_list, split_names
from rankfit.tasks.prompts import task_of
from rankfit.tasks.readers import (
    Columns,
    DataError,
    Raw,
    Reading,
    RecordError,
    Rows,
    find_part,
    find_test,
    hub_parts,
    read_table,
)
from rankfit.tasks.records import Encode, report_skipped, screen

log = logging.getLogger(__name__)

#: A whole number, maybe written as a float; a code such as 007 is text.
_WHOLE = re.compile(r"([+-]?(?:0|[1-9][0-9]{0,17}))(?:\.0*)?")
_SHOWN = 8
#: Rows whose labels were not given: data sets of the hub mark them so.
_UNLABELLED = -1


def wrong_label(label: Any) -> str:
    """Say why a label cannot name a class; "" = it can."""
    if isinstance(label, list | tuple | dict | np.ndarray):
        return (
            f"has the label {label!r}; expected one label a record, a number or text (several "
            "labels a record are not supported)"
        )
    if _missing(label):
        return "has no label"
    if isinstance(label, Real | Decimal) and label != math.trunc(label):
        return (
            f"has label {label!r}; expected a whole number or text (task.problem=regression takes "
            "numbers)"
        )
    return ""


def plain(label: Any) -> int | str:
    """A label as a whole number or as text, where :func:`wrong_label` finds nothing wrong."""
    if isinstance(label, bool | np.bool_):
        return str(bool(label))
    if isinstance(label, Real | Decimal):
        return int(math.trunc(label))
    if isinstance(label, bytes):
        return label.decode("utf-8", "backslashreplace")
    return label.isoformat() if isinstance(label, date) else str(label)


def typed(cells: Sequence[str]) -> Sequence[Any]:
    """Cells of a file without types (CSV) as whole numbers, if all that are not empty are some."""
    if all(not cell.strip() or _number(cell) is not None for cell in cells):
        return [_number(cell) if cell.strip() else None for cell in cells]
    return [cell if cell.strip() else None for cell in cells]


def _missing(label: Any) -> bool:
    if isinstance(label, str):
        return not label.strip()
    return label is None or (isinstance(label, Real | Decimal) and not math.isfinite(label))


def _number(text: str) -> int | None:
    """Whole number that a text is; None for others."""
    found = _WHOLE.fullmatch(text.strip())
    return None if found is None else int(found.group(1))


def _same(label: int | str) -> str:
    """What two spellings of one label have in common."""
    text = str(label).strip()
    number = _number(text)
    if number is not None:
        return str(number)
    return text.capitalize() if text.casefold() in ("true", "false") else text


def name_classes(settings: RunSettings, train: Raw, test: Raw | None) -> tuple[str, ...]:
    """Names of the classes, in the order of their ids.

    They come from ``data.class-names``, else from the data's own declaration, else from the labels
    found: text sorted, whole numbers up to the largest (or to ``data.classes``), or 1 … n as they
    are.

    Raises
    ------
    DataError
        If nodes with their own files could number the classes differently, or numbers are codes
        with gaps.
    """
    if settings.task.problem == "regression":
        return ()
    declared = split_names(settings.data.class_names) or train.names
    if declared:
        _refuse_short(settings, len(declared))
        return declared
    labels = {plain(label) for raw in (train, test) if raw is not None for label in raw.labels}
    numbers = sorted(label for label in labels if isinstance(label, int))
    whole = len(numbers) == len(labels)
    numbered = settings.task.kind == "causal-lm" or (whole and settings.data.classes)
    if settings.partition.kind == "local" and not numbered:
        raise DataError(
            "partition.kind 'local': each node would number the classes by what its own files "
            f"hold ({train.origin}); set data.class-names to the names of all classes"
        )
    if whole and settings.task.kind != "causal-lm":
        names = _numbered(settings, train.origin, numbers)
    else:
        names = tuple(sorted(str(label) for label in labels))
    _refuse_short(settings, len(names))
    return names


def _numbered(settings: RunSettings, origin: str, numbers: Sequence[int]) -> tuple[str, ...]:
    """Names of classes that are numbers: ids from 0, or 1 … n, or a refusal."""
    ids = [number for number in numbers if number >= 0]
    top = max(ids, default=-1) + 1
    if settings.partition.kind == "local":
        return tuple(map(str, range(max(top, settings.data.classes))))
    if list(numbers) == list(range(1, top)):
        return tuple(map(str, numbers))
    if not ids or top > max(2 * len(ids), settings.data.classes):
        codes = ",".join(map(str, numbers[:_SHOWN])) + (",…" if len(numbers) > _SHOWN else "")
        raise DataError(
            f"data {origin}: the labels {codes} are no ids from 0 without gaps: name them as "
            f"classes with data.class-names={codes}, or set data.classes to the number of ids"
        )
    absent = sorted(set(range(top)) - set(ids))
    if absent:
        log.warning("data %s: no record has label %s", origin, _shown(absent))
    return tuple(map(str, range(top)))


def _refuse_short(settings: RunSettings, count: int) -> None:
    if settings.data.classes > count:
        raise DataError(f"data.classes {settings.data.classes}: the data has only {count} classes")


class Ids:
    """Finds the id of a label: by its class's name, or, of names that are no numbers, by number."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._exact = {name: number for number, name in enumerate(names)}
        same: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            same.setdefault(_same(name), []).append(number)
        self._same = {text: ids[0] for text, ids in same.items() if len(ids) == 1}
        self._truth = set(self._same) == {"True", "False"}
        #: Whether a label may be an id: a name that is a number could be taken for one.
        self.numbered = not self._truth and all(_is_word(name) for name in names)

    def __call__(self, label: int | str) -> int | None:
        """Id of a label; None where it is no class."""
        found = self._exact.get(str(label), self._same.get(_same(label)))
        if found is not None:
            return found
        number = _number(str(label))
        truth = {"True": 1, "False": 0}.get(_same(label))
        if self._truth and number in (0, 1):
            return self._same[str(bool(number))]
        if truth is not None:  # of "yes, no" nobody could tell which is which
            return self._same.get(str(truth)) if set(self._same) == {"0", "1"} else None
        if self.numbered and number is not None and 0 <= number < len(self.names):
            return number
        return None

    def expected(self, label: int | str) -> str:
        """What a label that is no class should have been."""
        if _number(str(label)) is not None and (self.numbered or self._counted()):
            return f"0 … {len(self.names) - 1}"
        return f"one of {_shown(self.names)}"

    def _counted(self) -> bool:
        return list(self.names) == [str(number) for number in range(len(self.names))]


def assign(raw: Raw, names: Sequence[str], *, skip: bool = False) -> NDArray[np.int64]:
    """Turn labels into ids; with ``skip``, one that cannot be used becomes -1.

    Raises
    ------
    RecordError
        For a label that is no class or out of range.
    """
    ids = Ids(names)
    found: dict[int | str, int] = {}
    result = np.empty(len(raw.labels), dtype=np.int64)
    for row, given in enumerate(raw.labels):
        label = plain(given)
        if label not in found:
            number, wrong = _id(label, raw, ids)
            if number is None and not skip:
                raise RecordError(raw.origin, row, wrong, "label")
            found[label] = -1 if number is None else number
        result[row] = found[label]
    return result


def _id(label: int | str, raw: Raw, ids: Ids) -> tuple[int | None, str]:
    """Id of a label, or what is wrong with it."""
    named: int | str = label
    if raw.names is not None and isinstance(label, int):  # a number of the data's own class
        if not 0 <= label < len(raw.names):
            expected = f"0 … {len(raw.names) - 1}"
            return None, f"has label {label!r}; expected {expected}{_unlabelled(label)}"
        named = raw.names[label]
    number = ids(named)
    return number, f"has label {named!r}; expected {ids.expected(named)}{_unlabelled(label)}"


def _unlabelled(label: int | str) -> str:
    return f" ({_UNLABELLED} stands for none in many data sets)" if label == _UNLABELLED else ""


def keep_first(labels: NDArray[np.int64], classes: int, count: int) -> NDArray[np.int64]:
    """Rows of the first ``classes`` classes (0 = all ``count`` of them)."""
    return np.flatnonzero((labels >= 0) & (labels < (classes or count)))


def _is_word(name: str) -> bool:
    """Whether a class's name is no number."""
    try:
        float(name)
    except ValueError:
        return True
    return False


def _shown(names: Iterable[Any]) -> str:
    listed = list(map(str, names))
    return ", ".join(listed[:_SHOWN]) + (" …" if len(listed) > _SHOWN else "")


def is_number(label: Any) -> bool:
    """Whether a label is a finite number."""
    return isinstance(label, Real | Decimal) and math.isfinite(label)


__all__ = ["DataError", "Dataset", "Examples", "known_labels", "read_data"]

_INPUT_COLUMNS = {
    "image-classification": ("image", "img", "file_name", "path"),
    "text-classification": ("text",),
}
_DIGITS = "sklearn:digits"
_DIGITS_MAXIMUM = 16.0


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
    """A training and a test set over the same classes."""

    train: Examples
    test: Examples
    class_names: tuple[str, ...]


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

    Raises
    ------
    DataError
        If something is missing, empty, or cannot be a label.
    """
    train, test = _read_parts(settings, data_path)
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
        train_set, test_set = _hold_out(train_set, settings)
    kept = names[: settings.data.classes] if settings.data.classes else names
    return Dataset(
        _draw(train_set, settings.data.train_samples, derive(settings.run.seed, "train-samples")),
        _draw(test_set, settings.data.test_samples, derive(settings.run.seed, "test-samples")),
        kept,
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


def _read_parts(settings: RunSettings, data_path: str | None) -> tuple[Raw, Raw | None]:
    """Read the training part, and the test part where there is one."""
    data, kind = settings.data, settings.task.kind
    source = data.source if data_path is None else data_path
    if source.startswith("sklearn:"):
        return _digits(source, kind), None
    columns = _columns(settings)
    place = Path(source).expanduser()
    if place.is_file():
        return read_table([place], str(place), columns, data), None
    if place.is_dir():
        if data.name and data_path is None and (place / data.name).is_dir():
            place = place / data.name  # a copy of a hub repository, one configuration of it
        return _folder_parts(place, source, columns, settings)
    if data_path is not None or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise DataError(f"data {source!r}: there is no such file or folder")
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
            f"{', '.join(sorted(item.name for item in place.iterdir())[:8]) or 'nothing'}"
        )
    test = find_test(place, columns, data)
    if test is None and data.test not in ("", "test"):
        raise DataError(f"data folder {source!r}: nothing matches data.test {data.test!r}")
    return train, test


def _columns(settings: RunSettings) -> Columns:
    data, kind, group = settings.data, settings.task.kind, settings.partition.column
    if kind == "causal-lm":
        return Columns((), data.label_column, records=True, group=group)
    own = split_list(data.input_column)
    return Columns(
        own or _INPUT_COLUMNS[kind],
        data.label_column,
        images=kind == "image-classification",
        pairs=len(own) > 1,
        group=group,
    )


def _digits(source: str, kind: str) -> Raw:
    if source != _DIGITS or kind != "image-classification":
        raise DataError(
            f"data.source {source!r} for {kind}: expected {_DIGITS!r} for image-classification"
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
        raise DataError(f"data {raw.origin}: the set is empty")
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


def _hold_out(examples: Examples, settings: RunSettings) -> tuple[Examples, Examples]:
    from sklearn.model_selection import train_test_split

    fraction = settings.data.test_fraction
    try:
        train, test = train_test_split(
            np.arange(len(examples)),
            test_size=fraction,
            random_state=derive(settings.run.seed, "hold-out") % 2**32,
            stratify=examples.labels if _classifies(settings) else None,
        )
    except ValueError as error:
        raise DataError(
            f"data.test-fraction {fraction}: {len(examples)} examples of "
            f"{len(np.unique(examples.labels))} classes cannot be split with every class on both "
            f"sides ({error}); give a test set, more examples, or another fraction"
        ) from error
    return _select(examples, np.sort(train)), _select(examples, np.sort(test))


def _classifies(settings: RunSettings) -> bool:
    return settings.task.kind != "causal-lm" and settings.task.problem == "classification"
