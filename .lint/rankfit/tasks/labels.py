"""Labels as ids: the same label has the same id in every set of a run."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfit.configs.settings import RunSettings, split_list
from rankfit.tasks.raw import DataError, Raw


def name_classes(settings: RunSettings, train: Raw, test: Raw | None) -> tuple[str, ...]:
    """Names of the classes, in the order of their ids.

    They come from ``data.class-names``, else from the data's own declaration, else from the labels
    found: strings sorted, integers up to the largest (or to ``data.classes``).

    Raises
    ------
    DataError
        If nodes with their own files could number the classes differently, or labels mix types.
    """
    if settings.task.problem == "regression":
        return ()
    declared = split_list(settings.data.class_names) or train.names
    if declared:
        _refuse_short(settings, len(declared))
        return declared
    labels = [*train.labels, *(test.labels if test is not None else ())]
    integers = all(_is_integer(label) for label in labels)
    numbered = settings.task.kind == "causal-lm" or (integers and settings.data.classes)
    if settings.partition.kind == "local" and not numbered:
        raise DataError(
            "partition.kind 'local': each node would number the classes by what its own files "
            f"hold ({train.origin}); set data.class-names to the names of all classes"
        )
    if integers:
        count = max((int(label) for label in labels), default=-1) + 1
        if settings.partition.kind == "local":
            count = max(count, settings.data.classes)
        _refuse_short(settings, count)
        return tuple(str(label) for label in range(count))
    wrong = next((label for label in labels if not isinstance(label, str)), None)
    if wrong is not None or any(label is None for label in labels):
        raise DataError(
            f"data {train.origin}: label {wrong!r} in column {settings.data.label_column!r}; "
            "expected integers alone or text alone, none missing"
        )
    names = tuple(sorted(set(labels)))
    _refuse_short(settings, len(names))
    return names


def _refuse_short(settings: RunSettings, count: int) -> None:
    if settings.data.classes > count:
        raise DataError(f"data.classes {settings.data.classes}: the data has only {count} classes")


def assign(raw: Raw, names: Sequence[str], *, skip: bool = False) -> NDArray[np.int64]:
    """Turn labels into ids; with ``skip``, one that cannot be used becomes -1.

    Raises
    ------
    DataError
        For a label that is no class or out of range, with its row.
    """
    ids = {name: number for number, name in enumerate(names)}
    aligned = raw.names is None or raw.names == tuple(names)
    declared = names if raw.names is None else raw.names
    result = np.empty(len(raw.labels), dtype=np.int64)
    for row, label in enumerate(raw.labels):
        expected = f"0 … {len(declared) - 1}"
        if _is_integer(label) and 0 <= int(label) < len(declared):
            if aligned:
                result[row] = int(label)
                continue
            label = declared[int(label)]
        if not _is_integer(label):
            if label in ids:
                result[row] = ids[label]
                continue
            expected = f"one of {', '.join(list(ids)[:8])}{' …' if len(ids) > 8 else ''}"
        if not skip:
            raise DataError(
                f"data {raw.origin}: row {row} has label {label!r}; expected {expected}"
            )
        result[row] = -1
    return result


def keep_first(labels: NDArray[np.int64], classes: int, count: int) -> NDArray[np.int64]:
    """Rows of the first ``classes`` classes (0 = all ``count`` of them)."""
    return np.flatnonzero((labels >= 0) & (labels < (classes or count)))


def _is_integer(label: Any) -> bool:
    return isinstance(label, Integral)
