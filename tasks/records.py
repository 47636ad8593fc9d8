"""Records as every reader gives them back, and their labels as ids.

The same label has the same id in every set of a run, whatever type it is of. One node has ratings
as numbers, another as text, a third as floats since a cell was empty once. A label is therefore
compared by what it says: ``1``, ``1.0`` and ``"1"`` are one, ``True`` and ``"true"`` too.
"""

import fnmatch
import hashlib
import logging
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankfit.configs.faults import Faulty
from rankfit.configs.settings import RunSettings, split_names

log = logging.getLogger(__name__)

#: What is wrong with a record, in a word that says nothing of its content.
Fault = Literal["cells", "encoding", "input", "label"]
_CODES: dict[Fault, str] = {
    "cells": "data-format", "encoding": "data-format", "input": "data-record",
    "label": "data-label",
}  # fmt: skip


class DataError(Faulty, ValueError):
    """Data that is missing or cannot be used."""

    code = "data-record"


class TableError(DataError):
    """A file that is no table that can be read."""

    code = "data-format"


@dataclass(frozen=True)
class Access:
    """What of this machine's data a run may read, and name; the default is all.

    Attributes
    ----------
    folders : tuple of Path or None
        Files must lie in one of these, which hold no links themselves; None = anywhere.
    columns : tuple of str
        Patterns of the columns that may be read; others are not there.
    label_names : bool
        Values of a label column may be in the names of figures. Those that the run itself names
        always may.
    """

    folders: tuple[Path, ...] | None = None
    columns: tuple[str, ...] = ("*",)
    label_names: bool = True

    def pattern(self, pattern: str) -> str:
        """Return a file pattern; refuse one that climbs out of its folder, whatever is there."""
        parts = Path(pattern).parts
        if self.folders is not None and (".." in parts or Path(pattern).is_absolute()):
            raise _outside(pattern, self.folders)
        return pattern

    def file(self, file: Path) -> Path:
        """Return a file or folder that may be read.

        Raises
        ------
        DataError
            If it lies elsewhere, once ``..`` and links are followed.
        """
        if self.folders is not None:
            real = Path(os.path.realpath(file))
            if not any(real.is_relative_to(folder) for folder in self.folders):
                raise _outside(f"{file} (which is {real})", self.folders)
        return file

    def visible(self, columns: Sequence[str]) -> list[str]:
        """Those of a table's columns that may be read."""
        return [c for c in columns if any(fnmatch.fnmatchcase(c, p) for p in self.columns)]


#: Of whoever owns the data.
EVERYTHING = Access()


def _outside(what: str, folders: Sequence[Path]) -> DataError:
    return DataError(
        f"data {what} lies in none of the folders that this node allows: "
        f"{', '.join(map(str, folders)) or 'none'}",
        fault="policy-data",
    )


#: Characters of what is wrong with a record that a message shows: it may quote a whole one.
_LONGEST = 400


class RecordError(DataError):
    """One record that cannot be used.

    Attributes
    ----------
    row : int
        Its position in the set, from 0.
    fault : str
        What is wrong, in a word; the message itself may quote the record.
    """

    def __init__(self, origin: str, row: int, wrong: str, fault: Fault) -> None:
        wrong = wrong if len(wrong) <= _LONGEST else f"{wrong[:_LONGEST]} …"
        super().__init__(
            f"data {origin}: row {row} {wrong} (data.bad-records=skip leaves such rows out)",
            fault=_CODES[fault],
            row=row,
        )
        self.row, self.fault = row, fault
        self._parts = (origin, row, wrong, fault)

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, int, str, Fault]]:
        """Survive the way between processes."""
        return RecordError, self._parts


@dataclass(frozen=True)
class Reading:
    """How records of language data are read.

    Attributes
    ----------
    form : str
        ``instruction``, ``messages``, ``sharegpt``, ``prompt-completion`` or ``text``.
    columns : dict
        Column of each part of a record.
    """

    form: str
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Raw:
    """Inputs and labels as they were read.

    Attributes
    ----------
    origin : str
        Names the data in errors.
    inputs, labels : sequence
        One of each for every record.
    names : tuple of str or None
        Classes that the data itself declares (ClassLabel); None where it only holds labels.
    groups : sequence or None
        Values of ``partition.column``.
    reading : Reading or None
        Of language data: how its records are read.
    files : tuple of Path
        Files that hold the records; with ``version``, what tells the same content again.
    version : str
        Fingerprint of content that is not in ``files``.
    """

    origin: str
    inputs: Sequence[Any]
    labels: Sequence[Any]
    names: tuple[str, ...] | None = None
    groups: Sequence[Any] | None = None
    reading: Reading | None = None
    files: tuple[Path, ...] = ()
    version: str = ""

    def fingerprint(self) -> str:
        """Hash that changes with the content's files: their paths, sizes and times of change.

        "" where the content comes from neither files nor a data set with a fingerprint.
        """
        if not self.files and not self.version:
            return ""
        digest = hashlib.sha256(f"{self.version} {len(self.labels)}".encode())
        for file in self.files:
            try:
                found = file.stat()
                state = f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
            except OSError:
                state = "absent"
            digest.update(f"\0{file.absolute()} {state}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Rows(Sequence[Any]):
    """Some rows of a sequence, in an order, without a copy."""

    whole: Sequence[Any]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[int(self.rows[index])]


@dataclass(frozen=True)
class Chained(Sequence[Any]):
    """Sequences one after another, without a copy."""

    parts: tuple[Sequence[Any], ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def select(raw: Raw, kept: Sequence[int]) -> Raw:
    """Some rows of what was read."""
    groups = None if raw.groups is None else [raw.groups[row] for row in kept]
    labels = [raw.labels[row] for row in kept]
    inputs = Rows(raw.inputs, np.array(kept, dtype=np.int64))
    return replace(raw, inputs=inputs, labels=labels, groups=groups)


def report_skipped(origin: str, count: int, what: str) -> None:
    """Say how many records were left out."""
    if count:
        log.warning("data %s: %d records with %s are left out", origin, count, what)


# Labels

#: A whole number, maybe written as a float; a code such as 007 is text.
_WHOLE = re.compile(r"([+-]?(?:0|[1-9][0-9]{0,17}))(?:\.0*)?")
_SHOWN = 8
#: Ids up to which a node's labels are numbers of classes and no codes.
_MOST_IDS = 2**20
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


def _spelled(label: int | str) -> str:
    """A label without blanks around it, and composed: macOS writes é as e and an accent."""
    return unicodedata.normalize("NFC", str(label)).strip()


def _same(label: int | str) -> str:
    """What two spellings of one label have in common."""
    text = _spelled(label)
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
            f"hold ({train.origin}); set data.class-names to the names of all classes",
            fault="data-classes",
        )
    if whole and settings.task.kind != "causal-lm":
        names = _numbered(settings, train.origin, numbers)
    else:
        names = tuple(sorted({_spelled(label) for label in labels}))
        _warn_alike(train.origin, names)
    _refuse_short(settings, len(names))
    return names


def _numbered(settings: RunSettings, origin: str, numbers: Sequence[int]) -> tuple[str, ...]:
    """Names of classes that are numbers: ids from 0, or 1 … n, or a refusal."""
    ids = [number for number in numbers if number >= 0]
    top = max(ids, default=-1) + 1
    if settings.partition.kind == "local" and top <= _MOST_IDS:
        return tuple(map(str, range(max(top, settings.data.classes))))
    if ids and ids[0] == 1 and len(ids) == top - 1 == len(numbers):
        return tuple(map(str, numbers))
    if not ids or top > max(2 * len(ids), settings.data.classes):
        codes = ",".join(map(str, numbers[:_SHOWN])) + (",…" if len(numbers) > _SHOWN else "")
        raise DataError(
            f"data {origin}: the labels {codes} are no ids from 0 without gaps: name them as "
            f"classes with data.class-names={codes}, or set data.classes to the number of ids",
            fault="data-classes",
        )
    absent = sorted(set(range(top)) - set(ids))
    if absent:
        log.warning("data %s: no record has label %s", origin, _shown(absent))
    return tuple(map(str, range(top)))


def _warn_alike(origin: str, names: Sequence[str]) -> None:
    """Say which names differ in case alone: they are classes of their own."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.casefold(), []).append(name)
    for own in alike.values():
        if len(own) > 1:
            log.warning("data %s: %s are different classes", origin, _shown(own))


def _refuse_short(settings: RunSettings, count: int) -> None:
    if settings.data.classes > count:
        raise DataError(
            f"data.classes {settings.data.classes}: the data has only {count} classes",
            fault="data-classes",
        )


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
