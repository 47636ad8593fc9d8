"""The examples of a run: read from scikit-learn, local files or the hub, with integer labels.

Inputs stay as they are read (text, images not yet decoded); the task encodes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfit.configs.seeds import derive
from rankfit.configs.settings import RunSettings, split_list
from rankfit.tasks.files import Columns, find_part, hub_parts, read_table
from rankfit.tasks.labels import assign, keep_first, name_classes
from rankfit.tasks.raw import DataError, Raw

__all__ = ["DataError", "Dataset", "Examples", "known_labels", "read_data"]

_INPUT_COLUMNS = {
    "image-classification": ("image", "img"),
    "text-classification": ("text",),
}
_DIGITS = "sklearn:digits"
_DIGITS_MAXIMUM = 16.0


@dataclass(frozen=True)
class Examples:
    """Inputs and their labels, int64 of shape (n,)."""

    inputs: Sequence[Any]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test set over the same classes."""

    train: Examples
    test: Examples
    class_names: tuple[str, ...]


def known_labels(settings: RunSettings) -> int | None:
    """Number of classes if the settings alone decide it, without a look at the data."""
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
    names = name_classes(settings, train, test)
    train_set = _examples(train, names, settings)
    if test is not None:
        test_set = _examples(test, names, settings)
    elif data_path is not None and settings.server.evaluate != "clients":
        test_set = _select(train_set, np.arange(0))
    else:
        train_set, test_set = _hold_out(train_set, settings)
    kept = names[: settings.data.classes] if settings.data.classes else names
    return Dataset(train_set, test_set, kept)


def _read_parts(settings: RunSettings, data_path: str | None) -> tuple[Raw, Raw | None]:
    """Read the training part, and the test part where there is one."""
    data, kind = settings.data, settings.task.kind
    source = data.source if data_path is None else data_path
    if source.startswith("sklearn:"):
        return _digits(source, kind), None
    columns = Columns(
        (data.input_column,) if data.input_column else _INPUT_COLUMNS[kind],
        data.label_column,
        images=kind == "image-classification",
    )
    place = Path(source).expanduser()
    if place.is_file():
        return read_table([place], str(place), columns), None
    if place.is_dir():
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
    labels = assign(raw, names)
    kept = keep_first(labels, settings.data.classes, len(names))
    if not len(kept):
        raise DataError(f"data {raw.origin}: the set is empty")
    if settings.task.kind == "text-classification":
        for row, text in enumerate(raw.inputs):
            if not isinstance(text, str):
                raise DataError(f"data {raw.origin}: row {row} holds {text!r}, expected text")
    return _select(Examples(raw.inputs, labels), kept)


def _select(examples: Examples, rows: NDArray[np.int64]) -> Examples:
    if len(rows) == len(examples):
        return examples
    return Examples(Rows(examples.inputs, rows), examples.labels[rows])


@dataclass(frozen=True)
class Rows(Sequence[Any]):
    """Some rows of a sequence, in an order, without a copy."""

    whole: Sequence[Any]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[int(self.rows[index])]


def _hold_out(examples: Examples, settings: RunSettings) -> tuple[Examples, Examples]:
    from sklearn.model_selection import train_test_split

    fraction = settings.data.test_fraction
    try:
        train, test = train_test_split(
            np.arange(len(examples)),
            test_size=fraction,
            random_state=derive(settings.run.seed, "hold-out") % 2**32,
            stratify=examples.labels,
        )
    except ValueError as error:
        raise DataError(
            f"data.test-fraction {fraction}: {len(examples)} examples of "
            f"{len(np.unique(examples.labels))} classes cannot be split with every class on both "
            f"sides ({error}); give a test set, more examples, or another fraction"
        ) from error
    return _select(examples, np.sort(train)), _select(examples, np.sort(test))
