"""Readers of local files, folders of images, and the hub."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfit.configs import settings as config_settings
from rankfit.configs.settings import split_list
from rankfit.tasks.raw import DataError, Raw

#: Builder of ``datasets`` by file ending, and its arguments.
_READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Columns:
    """Where a table holds inputs and labels.

    Attributes
    ----------
    inputs : tuple of str
        The first of these that is there; with ``records`` or ``pairs``, all of them.
    label : str
        Column of the labels; with ``records`` it may be absent.
    images : bool
        The input is an image.
    pairs : bool
        The input is the tuple of the columns.
    records : bool
        The input is the whole row, as a dict.
    group : str
        Column that a natural partition goes by ("" = none).
    """

    inputs: tuple[str, ...]
    label: str
    images: bool = False
    pairs: bool = False
    records: bool = False
    group: str = ""


@dataclass(frozen=True)
class ImageFiles(Sequence[Any]):
    """Images opened when they are asked for."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as image:
                image.load()
                return image
        except OSError as error:
            raise DataError(f"image {self.paths[index]}: cannot be read: {error}") from error


def find_part(folder: Path, pattern: str, columns: Columns) -> Raw | None:
    """Read the part of a folder that a pattern names; None if nothing matches.

    A pattern is the name of a file or subfolder, a glob, or a bare split name: ``train`` also
    finds ``train.csv``, ``train-00000-of-00002.parquet`` and, for images, the folder itself when
    its subfolders are the classes. Several are separated by commas; each must then match.
    """
    patterns = split_list(pattern)
    if len(patterns) > 1:
        found = [(part, _find_files(folder, part)) for part in patterns]
        for part, files in found:
            if not files:
                raise DataError(f"data folder {str(folder)!r}: nothing matches {part!r}")
        return _read([file for _, files in found for file in files], f"{folder}", columns)
    endings = [f"{pattern}{end}" for end in _READERS] + [f"{pattern}-*{end}" for end in _READERS]
    for candidate in (pattern, *endings):
        folders = sorted(match for match in folder.glob(candidate) if match.is_dir())
        if folders and columns.images and _class_folders(folders[0]):
            return _image_folder(folders[0])
    files = _find_files(folder, pattern)
    if files:
        return _read(files, f"{folder / pattern}", columns)
    if columns.images and pattern == "train" and _class_folders(folder):
        return _image_folder(folder)
    return None


def _find_files(folder: Path, pattern: str) -> list[Path]:
    """Tables that the first meaning of a pattern with any gives."""
    endings = [f"{pattern}{end}" for end in _READERS] + [f"{pattern}-*{end}" for end in _READERS]
    for candidate in (pattern, *endings):
        matches = sorted(folder.glob(candidate))
        files = [match for match in matches if match.is_file()]
        for inside in matches:
            if inside.is_dir():
                files += sorted(item for item in inside.iterdir() if item.suffix in _READERS)
        if files:
            return files
    return []


def _read(files: Sequence[Path], origin: str, columns: Columns) -> Raw:
    """Read files; records of several folders without a label column are labelled by folder.

    That is the layout of LLM-Adapters: ``boolq/test.json``, ``piqa/test.json``.
    """
    if not columns.records or len({file.parent for file in files}) == 1:
        return read_table(files, origin, columns)
    parts = [read_table([file], str(file), columns) for file in files]
    inputs = [record for part in parts for record in part.inputs]
    labels = [
        str(label) or file.parent.name
        for file, part in zip(files, parts, strict=True)
        for label in part.labels
    ]
    groups = [value for part in parts for value in part.groups or ()]
    return Raw(origin, inputs, labels, None, groups or None)


def _class_folders(folder: Path) -> list[Path]:
    """Subfolders that hold images."""
    return sorted(
        item
        for item in folder.iterdir()
        if item.is_dir() and any(file.suffix.lower() in _IMAGES for file in item.iterdir())
    )


def _image_folder(folder: Path) -> Raw:
    """Read ``CLASS/image.png``; the classes are the subfolders' names, sorted."""
    classes = _class_folders(folder)
    paths, labels = [], []
    for item in classes:
        found = sorted(file for file in item.iterdir() if file.suffix.lower() in _IMAGES)
        paths += found
        labels += [item.name] * len(found)
    return Raw(str(folder), ImageFiles(tuple(paths)), labels)


def read_table(files: Sequence[Path], origin: str, columns: Columns) -> Raw:
    """Read files of one format.

    Raises
    ------
    DataError
        If a file has an unknown ending or cannot be read, or a column is missing.
    """
    import datasets

    ending = files[0].suffix.lower()
    if ending not in _READERS or any(file.suffix.lower() != ending for file in files):
        raise DataError(
            f"data {origin}: files {', '.join(file.name for file in files[:3])}; expected one of "
            f"{', '.join(_READERS)}, the same for all"
        )
    builder, arguments = _READERS[ending]
    with _quiet():
        try:
            reader = datasets.load_dataset_builder(
                builder, data_files=[str(file) for file in files], **arguments
            )
            reader.download_and_prepare()
            if not reader.info.splits["train"].num_examples:
                raise DataError(f"data {origin}: the set is empty")
            table = reader.as_dataset(split="train")
        except DataError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            cause = error.__cause__ or error
            raise DataError(f"data {origin}: cannot be read as {builder}: {cause}") from error
    return _from_table(table, origin, columns, files[0].parent)


def hub_parts(data: config_settings.Data, columns: Columns) -> tuple[Raw, Raw | None]:
    """Read the training split of a hub data set, and its test split where there is one.

    Raises
    ------
    DataError
        If the data set or a split cannot be had.
    """
    import datasets

    def read(split: str) -> Raw:
        # A slice such as train[:10%] is no name of a split.
        table = (
            whole[split]
            if split in whole
            else datasets.load_dataset(data.source, data.name or None, split=split)
        )
        return _from_table(table, f"{data.source} {split}", columns, Path())

    with _quiet():
        try:
            whole = datasets.load_dataset(data.source, data.name or None)
            wanted = bool(data.test) and (data.test != "test" or "test" in whole)
            return read(data.train), read(data.test) if wanted else None
        except DataError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            raise DataError(
                f"data.source {data.source!r} (name {data.name!r}, splits {data.train!r} and "
                f"{data.test!r}) is neither a file or folder here nor a data set that can be had "
                f"from the hub: check the id and the connection, or give local files. {first_line}"
            ) from error


def _from_table(table: Any, origin: str, columns: Columns, folder: Path) -> Raw:
    """Pick the columns; paths of images are relative to ``folder``."""
    import datasets

    present = list(table.column_names)
    column = next((name for name in columns.inputs if name in present), None)
    if column is None:
        raise _no_column(origin, " or ".join(columns.inputs), present, "data.input-column")
    if columns.pairs or columns.records:
        for name in columns.inputs:
            if name not in present:
                raise _no_column(origin, name, present, "data.input-column or data.format")
    if columns.group and columns.group not in present:
        raise _no_column(origin, columns.group, present, "partition.column")
    groups = table[columns.group][:] if columns.group else None
    if columns.label not in present:
        if not columns.records:
            raise _no_column(origin, columns.label, present, "data.label-column")
        return Raw(origin, table.to_list(), [""] * len(table), None, groups)
    feature = table.features[columns.label]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    labels = table[columns.label][:]
    if columns.records:
        return Raw(origin, table.to_list(), labels, names, groups)
    if columns.pairs:
        inputs = list(zip(*(table[name][:] for name in columns.inputs), strict=True))
        return Raw(origin, inputs, labels, names, groups)
    if not columns.images:
        return Raw(origin, table[column][:], labels, names, groups)
    if table.features[column] in (datasets.Value("string"), datasets.Value("large_string")):
        paths = tuple(folder / path for path in table[column])
        return Raw(origin, ImageFiles(paths), labels, names, groups)
    if not isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image())
    return Raw(origin, table[column], labels, names, groups)


def _no_column(origin: str, wanted: str, present: Sequence[str], key: str) -> DataError:
    return DataError(
        f"data {origin}: there is no column {wanted!r}; the columns are {', '.join(present)}: "
        f"set {key}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep ``datasets`` from drawing progress bars, and give the setting back."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
