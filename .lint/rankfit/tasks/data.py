"""The examples of a run: read from scikit-learn, local files or the hub, with integer labels.

Inputs stay as they are read (text, images not yet decoded); the task encodes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfit.configs.seeds import derive
from rankfit.configs.settings import RunSettings, split_list
from rankfit.tasks.commonsense import task_of
from rankfit.tasks.files import Columns, find_part, hub_parts, read_table
from rankfit.tasks.labels import assign, keep_first, name_classes
from rankfit.tasks.raw import DataError, Raw, Rows
from rankfit.tasks.records import report_skipped, screen

__all__ = ["DataError", "Dataset", "Examples", "known_labels", "read_data"]

_INPUT_COLUMNS = {
    "image-classification": ("image", "img"),
    "text-classification": ("text",),
}
#: Columns of language data by ``data.format``; an instruction's ``input`` may be absent.
_RECORD_COLUMNS = {
    "instruction": ("instruction", "output"),
    "messages": ("messages",),
    "text": ("text",),
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
    """

    inputs: Sequence[Any]
    labels: NDArray[np.int64]
    targets: NDArray[np.float32] | None = None
    groups: NDArray[np.str_] | None = None

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
    names = split_list(settings.data.class_names)
    if names:
        return settings.data.classes or len(names)
    return settings.data.classes or None


def read_data(settings: RunSettings, *, data_path: str | None = None) -> Dataset:
    """Read both sets.

    Without a test set, ``data.test-fraction`` of the training set is held out, stratified by class
    and drawn from the seed. A node's own files are held out from only where clients evaluate.

    Parameters
    ----------
    settings
        What to read, and how labels become ids.
    data_path
        A node's own file or folder, in place of ``data.source``.

    Raises
    ------
    DataError
        If something is missing, empty, or cannot be a label.
    """
    train, test = _read_parts(settings, data_path)
    train = screen(_labelled(train, settings), settings)
    test = None if test is None else screen(_labelled(test, settings), settings)
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
    """Name the task of each commonsense record by its answers, where the data does not."""
    if settings.task.suite != "commonsense" or any(raw.labels):
        return raw
    return replace(raw, labels=[task_of(record) for record in raw.inputs])


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
        return read_table([place], str(place), columns), None
    if place.is_dir():
        if data.name and data_path is None and (place / data.name).is_dir():
            place = place / data.name  # a copy of a hub repository, one configuration of it
        train = find_part(place, data.train, columns)
        if train is None:
            raise DataError(
                f"data folder {source!r}: nothing matches data.train {data.train!r}; it holds "
                f"{', '.join(sorted(item.name for item in place.iterdir())[:8]) or 'nothing'}"
            )
        test = find_part(place, data.test, columns) if data.test else None
        if test is None and data.test not in ("", "test"):
            raise DataError(f"data folder {source!r}: nothing matches data.test {data.test!r}")
        return train, test
    if data_path is not None or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise DataError(f"data {source!r}: there is no such file or folder")
    return hub_parts(data, columns)


def _columns(settings: RunSettings) -> Columns:
    data, kind, group = settings.data, settings.task.kind, settings.partition.column
    if kind == "causal-lm":
        names = _RECORD_COLUMNS[data.format]
        return Columns(names, data.label_column, records=True, group=group)
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
    if not len(kept):
        raise DataError(f"data {raw.origin}: the set is empty")
    return _select(Examples(raw.inputs, labels, targets, groups), kept)


def _select(examples: Examples, rows: NDArray[np.int64]) -> Examples:
    if len(rows) == len(examples):
        return examples
    return Examples(
        Rows(examples.inputs, rows),
        examples.labels[rows],
        None if examples.targets is None else examples.targets[rows],
        None if examples.groups is None else examples.groups[rows],
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
