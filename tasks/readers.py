"""Where the parts of a data set lie: files, folders of tables or pictures, saved sets, the hub."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankfit.configs.learning import Data
from rankfit.configs.settings import split_list
from rankfit.tasks.prompts import KNOWN_COLUMNS, find_reading
from rankfit.tasks.records import (
    EVERYTHING,
    Access,
    Chained,
    DataError,
    Raw,
    Reading,
    report_skipped,
    select,
    typed,
)
from rankfit.tasks.tables import (
    ENDINGS,
    ArrowTable,
    CellTable,
    Table,
    ending,
    is_table,
    open_arrow,
    open_table,
    quiet,
    refuse_pointer,
    refuse_wrong_rows,
)

__all__ = [
    "Columns",
    "DataError",
    "ImageFiles",
    "find_part",
    "find_test",
    "hub_parts",
    "read_table",
]

log = logging.getLogger(__name__)

_IMAGES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".tga", ".avif", ".jp2",
}  # fmt: skip
#: What systems and programs leave in folders; all that is hidden is, too.
_STRAY = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "__pycache__", "lost+found"}
#: Files that describe a data set and hold none of its records.
_DESCRIPTIONS = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}
#: Other names of a split, the nearest first; ``validation`` stands in for a test set.
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VALIDATION = ("validation", "valid", "val", "dev", "eval", "evaluation")
_SPLITS = {*_TRAIN, *_TEST, *_VALIDATION}
_SHOWN = 5
_MISSING = "data-missing"


@dataclass(frozen=True)
class Columns:
    """Where a table holds inputs and labels.

    Attributes
    ----------
    inputs : tuple of str
        The first of these that is there; with ``pairs``, all of them.
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
    access : Access
        What may be read at all.
    """

    inputs: tuple[str, ...]
    label: str
    images: bool = False
    pairs: bool = False
    records: bool = False
    group: str = ""
    access: Access = EVERYTHING

    @property
    def likely(self) -> tuple[str, ...]:
        """Names by which a table's header is known."""
        known = KNOWN_COLUMNS if self.records else ()
        return (*self.inputs, *known, self.label, *([self.group] if self.group else []))


@dataclass(frozen=True)
class Picked:
    """Columns of one table that the run uses."""

    inputs: tuple[str, ...]
    label: str
    group: str
    reading: Reading | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Each column once."""
        names = (*self.inputs, self.label, self.group)
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True)
class ImageFiles(Sequence[Any]):
    """Images opened when they are asked for, turned as their EXIF data says."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(self.paths[index]) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except (OSError, Image.DecompressionBombError) as error:
            refuse_pointer(self.paths[index])
            cause = "it holds no picture" if isinstance(error, UnidentifiedImageError) else (
                getattr(error, "strerror", None) or str(error)
            )  # fmt: skip
            raise DataError(f"image {self.paths[index]}: {cause}", row=int(index)) from error


def pick(names: Sequence[str], origin: str, columns: Columns, data: Data) -> Picked:
    """Find the columns that a run uses among those of a table.

    Raises
    ------
    DataError
        If one is not there; the message names those that are.
    """

    def missing(wanted: str, key: str) -> DataError:
        return DataError(
            f"data {origin}: there is no column {wanted!r}; the columns are {', '.join(names)}: "
            f"set {key}",
            fault="data-column",
        )

    names = columns.access.visible(names)
    if columns.group and columns.group not in names:
        raise missing(columns.group, "partition.column")
    label = _named(columns.label, names)
    if columns.records:
        try:
            reading = find_reading(names, data)
        except DataError as error:
            raise DataError(f"data {origin}: {error}", fault="data-column") from error
        return Picked(tuple(reading.columns.values()), label, columns.group, reading)
    present = [name for name in (_named(wanted, names) for wanted in columns.inputs) if name]
    if not present:
        raise missing(" or ".join(columns.inputs), "data.input-column")
    if columns.pairs and len(present) < len(columns.inputs):
        absent = next(name for name in columns.inputs if not _named(name, names))
        raise missing(absent, "data.input-column")
    if not label:
        raise missing(columns.label, "data.label-column")
    return Picked(tuple(present if columns.pairs else present[:1]), label, columns.group)


def _named(wanted: str, names: Sequence[str]) -> str:
    """The column of a name, whatever its case where that leaves no doubt; "" = there is none."""
    if wanted in names:
        return wanted
    alike = [name for name in names if name.strip().casefold() == wanted.casefold()]
    return alike[0] if len(alike) == 1 else ""


def find_part(folder: Path, pattern: str, columns: Columns, data: Data) -> Raw | None:
    """Read the part of a folder that a pattern names; None if nothing matches.

    A pattern is the name of a file or subfolder, a glob, or a bare split name: ``train`` also
    finds ``train.csv``, ``train-00000-of-00002.parquet``, ``data/train-…``, ``Training`` and, for
    images, the folder itself when its subfolders are the classes. Several are separated by commas;
    each must then match.
    """
    patterns = split_list(pattern)
    if len(patterns) > 1:
        files = []
        for part in patterns:
            some = _find_files(folder, part, columns)
            if not some:
                raise DataError(
                    f"data folder {str(folder)!r}: nothing matches {part!r}", fault=_MISSING
                )
            files += some
        return _read(files, f"{folder}", columns, data)
    saved = _saved_set(folder)
    if saved is not None:
        split = _split_of(saved, pattern)
        return None if split is None else from_arrow(split, f"{folder}", columns, data)
    for candidate in _candidates(folder, pattern):
        for match in _matches(folder, candidate, columns):
            if match.is_dir() and (saved := _saved_set(match)) is not None and len(saved) == 1:
                return from_arrow(next(iter(saved.values())), f"{match}", columns, data)
            if match.is_dir() and columns.images and (found := _images(match, columns, data)):
                return found
    files = _find_files(folder, pattern, columns)
    if files:
        return _read(files, f"{folder / pattern}", columns, data)
    if columns.images and pattern == "train":
        return _images(folder, columns, data)
    return None


def find_test(folder: Path, columns: Columns, data: Data) -> Raw | None:
    """Read the part that ``data.test`` names, or the validation set where there is no test set."""
    found = find_part(folder, data.test, columns, data) if data.test else None
    if found is not None or data.test != "test":
        return found
    found = find_part(folder, "validation", columns, data)
    if found is not None:
        log.warning("data %s: there is no test set; the validation set is used", folder)
    return found


def _names_of(pattern: str) -> tuple[str, ...]:
    """A split name and its other names; of any other pattern, itself."""
    same = (names for names in (_TRAIN, _TEST, _VALIDATION) if pattern == names[0])
    return next(same, (pattern,))


def _candidates(folder: Path, pattern: str) -> Iterator[str]:
    """Patterns for the files of a part: bare, with an ending, in shards; in ``data`` as well."""
    for name in _names_of(pattern):
        for place in ("", "data/"):
            yield f"{place}{name}"
            for end in ENDINGS:
                yield from (f"{place}{name}{end}", f"{place}{name}{end}.*")
                yield from (f"{place}{name}-*{end}", f"{place}{name}-*{end}.*")


def _matches(folder: Path, pattern: str, columns: Columns) -> list[Path]:
    """What a pattern finds, whatever the case of a bare name; hidden files are not found."""
    try:
        found = list(folder.glob(columns.access.pattern(pattern)))
    except NotImplementedError as error:  # a pattern that is a whole path
        raise DataError(f"data folder {folder}: {pattern!r}: {error}", fault=_MISSING) from error
    if not found and pattern.casefold() in _SPLITS:
        found = [item for item in folder.iterdir() if item.name.casefold() == pattern]
    return sorted(columns.access.file(item) for item in found if not _is_stray(item))


def _is_stray(item: Path) -> bool:
    return item.name.startswith(".") or item.name in _STRAY


def _find_files(folder: Path, pattern: str, columns: Columns) -> list[Path]:
    """Tables that the first meaning of a pattern with any gives."""
    for candidate in _candidates(folder, pattern):
        matches = _matches(folder, candidate, columns)
        files = [match for match in matches if match.is_file()]
        if candidate.endswith(".*"):
            files = [file for file in files if is_table(file)]
        for inside in matches:
            if inside.is_dir():
                files += [item for item in sorted(inside.iterdir()) if _holds_records(item)]
        if files:
            return files
    return []


def _holds_records(file: Path) -> bool:
    described = file.name in _DESCRIPTIONS or _is_stray(file)
    return file.is_file() and is_table(file) and not described


def _read(files: Sequence[Path], origin: str, columns: Columns, data: Data) -> Raw:
    """Read files; records of several folders without a label column are labelled by folder.

    That is the layout of LLM-Adapters: ``boolq/test.json``, ``piqa/test.json``.
    """
    if not columns.records or len({file.parent for file in files}) == 1:
        return read_table(files, origin, columns, data)
    parts = []
    for file in files:
        part = read_table([file], str(file), columns, data)
        named = [file.parent.name if label in ("", None) else label for label in part.labels]
        parts.append(replace(part, labels=named))
    return _joined(parts, origin)


def read_table(files: Sequence[Path], origin: str, columns: Columns, data: Data) -> Raw:
    """Read files of one form, one after another.

    Raises
    ------
    DataError
        If a file has an unknown ending or cannot be read, or a column is missing.
    """
    for file in files:
        columns.access.file(file)
    form = ending(files[0])
    if form not in ENDINGS or any(ending(file) != form for file in files):
        raise DataError(
            f"data {origin}: files {', '.join(file.name for file in files[:3])}; expected one of "
            f"{', '.join(ENDINGS)}, the same for all",
            fault="data-format",
        )
    if form in (".parquet", ".arrow"):
        raws = list(_arrow_parts(files, columns, data))
    else:
        raws = [
            _from_table(open_table(file, data, columns.likely), file, columns, data)
            for file in files
        ]
    raw = _joined(raws, origin)
    if not len(raw.labels):
        raise DataError(f"data {origin}: the set is empty", fault="data-empty")
    if raw.reading is not None:
        parts = ", ".join(f"{part} {name!r}" for part, name in raw.reading.columns.items())
        log.info("data %s: read as %s (%s)", origin, raw.reading.form, parts)
    return raw


def _arrow_parts(files: Sequence[Path], columns: Columns, data: Data) -> Iterator[Raw]:
    """Read parquet or Arrow files: as one table, or one by one where their types differ."""

    def used(names: Sequence[str]) -> Sequence[str]:
        return pick(names, str(files[0]), columns, data).all

    try:
        whole = [_from_table(open_arrow(files, used), files[0], columns, data)]
    except DataError:
        if len(files) == 1:
            raise
        whole = [_from_table(open_arrow([file], used), file, columns, data) for file in files]
    own = tuple(files)
    yield from (replace(raw, files=(*own, *raw.files)) for raw in whole)


def _joined(parts: Sequence[Raw], origin: str) -> Raw:
    """Records of several files as one set."""
    if len(parts) == 1:
        return replace(parts[0], origin=origin)
    names = parts[0].names
    if any(part.names != names for part in parts):  # each by the names of its own file
        names = None
        parts = [_by_name(part) for part in parts]
    forms = {part.reading.form: part for part in parts if part.reading is not None}
    if len({str(part.reading) for part in parts}) > 1:
        raise DataError(
            f"data {origin}: its files differ in form: "
            f"{', '.join(f'{part.origin} is {form}' for form, part in forms.items())}"
        )
    groups = [value for part in parts for value in part.groups or ()]
    return Raw(
        origin,
        Chained(tuple(part.inputs for part in parts)),
        [label for part in parts for label in part.labels],
        names,
        groups or None,
        parts[0].reading,
        tuple(file for part in parts for file in part.files),
        " ".join(part.version for part in parts).strip(),
    )


def _by_name(part: Raw) -> Raw:
    if part.names is None:
        return part
    known = dict(enumerate(part.names))
    return replace(part, names=None, labels=[known.get(label, label) for label in part.labels])


def _saved_set(folder: Path) -> dict[str, Any] | None:
    """Splits of a folder that ``save_to_disk`` wrote; None where it is none."""
    if not ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
        return None
    import datasets

    try:
        with quiet():
            found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"data folder {str(folder)!r}: cannot be loaded from disk: {error}", fault="data-format"
        ) from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def _split_of(splits: dict[str, Any], pattern: str) -> Any | None:
    """The split of a name, or of another name for it."""
    return next((splits[name] for name in _names_of(pattern) if name in splits), None)


def from_arrow(data_set: Any, origin: str, columns: Columns, data: Data) -> Raw:
    """Read a data set of the library ``datasets``."""
    raw = _from_table(ArrowTable(data_set), Path(origin), columns, data)
    if raw.reading is not None:
        log.info("data %s: read as %s", origin, raw.reading.form)
    return replace(raw, origin=origin, files=())


def hub_parts(data: Data, columns: Columns) -> tuple[Raw, Raw | None]:
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
        return from_arrow(table, f"{data.source} {split}", columns, data)

    with quiet():
        try:
            whole = datasets.load_dataset(data.source, data.name or None)
            test = data.test
            if test == "test":
                test = next((name for name in (*_TEST, *_VALIDATION) if name in whole), "")
                if test in _VALIDATION:
                    log.warning("data %s: there is no test split; %s is used", data.source, test)
            return read(data.train), read(test) if test else None
        except DataError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            raise DataError(
                f"data.source {data.source!r} (name {data.name!r}, splits {data.train!r} and "
                f"{data.test!r}) is neither a file or folder here nor a data set that can be had "
                f"from the hub: check the id and the connection, or give local files. {first_line}",
                fault=_MISSING,
            ) from error


def _from_table(table: Table, file: Path, columns: Columns, data: Data) -> Raw:
    """Pick the columns; paths of images are relative to the folder of ``file``."""
    origin = str(file)
    picked = pick(table.names, origin, columns, data)
    groups = list(table.column(picked.group)) if picked.group else None
    labels: Sequence[Any] = [""] * len(table)
    names = None
    if picked.label:
        labels, names = table.column(picked.label), table.class_names(picked.label)
        if isinstance(table, CellTable) and ending(file) in (".csv", ".tsv"):
            labels = typed(labels)
    files: tuple[Path, ...] = (file,) if isinstance(table, CellTable) else ()
    inputs: Sequence[Any]
    if columns.records:
        inputs = table.records(picked.inputs)
    elif columns.pairs:
        inputs = list(zip(*(table.column(name) for name in picked.inputs), strict=True))
    elif columns.images:
        inputs, files = _pictures_of(table, picked.inputs[0], file, files)
        for each in files:
            columns.access.file(each)
    else:
        inputs = table.column(picked.inputs[0])
    raw = Raw(origin, inputs, labels, names, groups, picked.reading, files, table.version)
    whole = refuse_wrong_rows(table, origin, skip=data.bad_records == "skip")
    report_skipped(origin, len(labels) - len(whole), "another number of cells than the header")
    return raw if len(whole) == len(labels) else select(raw, whole)


def _pictures_of(
    table: Table, name: str, file: Path, files: tuple[Path, ...]
) -> tuple[Sequence[Any], tuple[Path, ...]]:
    """Pictures of a column, and the files that hold them."""
    try:
        held = table.images(name)
    except DataError as error:
        raise DataError(f"data {file}: {error}") from error
    if held is not None:
        return held, files
    # Windows' separators, in a table that was written there.
    given = (str(path) for path in table.column(name))
    paths = tuple(file.parent / (p if "/" in p else p.replace("\\", "/")) for p in given)
    return ImageFiles(paths), (*files, *paths)


# Folders of pictures


def _images(folder: Path, columns: Columns, data: Data) -> Raw | None:
    """Read pictures by class, or those that a ``metadata`` table of the folder lists."""
    for end in (".csv", ".jsonl", ".parquet"):
        file = folder / f"metadata{end}"
        if file.is_file() and _named(columns.label, _names_in(file, columns, data)):
            return read_table([file], str(folder), columns, data)
    found = _image_folder(folder)
    for each in found.files if found else ():
        columns.access.file(each)
    return found


def _names_in(file: Path, columns: Columns, data: Data) -> tuple[str, ...]:
    if ending(file) == ".parquet":
        import pyarrow.parquet

        return tuple(pyarrow.parquet.read_schema(file).names)
    return open_table(file, data, columns.likely).names


def _image_folder(folder: Path) -> Raw | None:
    """Read ``CLASS/picture.png``; the classes are the subfolders' names, sorted.

    Pictures of folders inside a class are the class's.

    Raises
    ------
    DataError
        If no subfolder holds pictures itself, so that nobody can say which are the classes.
    """
    left_out: list[Path] = []
    held: dict[Path, list[Path]] = {}
    for item in _visible(folder, left_out):
        if item.is_dir():
            held[item] = list(_walk(item, left_out))
        elif not (item.name in _DESCRIPTIONS or is_table(item)):
            left_out.append(item)
    inner = {item: [p for p in paths if p.parent != item] for item, paths in held.items()}
    # Splits that lie beside the classes are no classes.
    classes = {
        item: paths for item, paths in held.items()
        if paths and not (item.name.casefold() in _SPLITS and len(inner[item]) == len(paths))
    }  # fmt: skip
    if not classes:
        return None
    nested = [item for item in classes if inner[item]]
    if len(nested) == len(classes) and all(len(inner[item]) == len(held[item]) for item in nested):
        if len(classes) == 1:
            return _image_folder(nested[0])
        below = sorted({p.relative_to(item).parts[0] for item in nested for p in held[item]})
        raise DataError(
            f"data folder {str(folder)!r}: its folders ({_listed(i.name for i in nested)}) hold no "
            f"pictures but folders ({_listed(below)}): which are the classes? Put each picture at "
            "CLASS/PICTURE"
        )
    for item in nested:
        names = sorted({path.relative_to(item).parts[0] for path in inner[item]})
        log.warning(
            "data folder %s: %d pictures of folders inside %s (%s) are of class %s",
            folder, len(inner[item]), item.name, _listed(names), item.name,
        )  # fmt: skip
    _report_left_out(folder, left_out, [item for item, paths in held.items() if not paths])
    paths = tuple(path for item in sorted(classes) for path in classes[item])
    labels = [item.name for item in sorted(classes) for _ in classes[item]]
    return Raw(str(folder), ImageFiles(paths), labels, files=paths)


def _walk(folder: Path, left_out: list[Path]) -> Iterator[Path]:
    """Pictures of a folder and of those inside it."""
    for item in _visible(folder, left_out):
        if item.is_dir():
            yield from _walk(item, left_out)
        elif item.suffix.lower() in _IMAGES:
            yield item
        else:
            left_out.append(item)


def _visible(folder: Path, left_out: list[Path]) -> list[Path]:
    """What a folder holds, but for what systems and programs leave there."""
    items = sorted(folder.iterdir())
    left_out += [item for item in items if _is_stray(item)]
    return [item for item in items if not _is_stray(item)]


def _report_left_out(folder: Path, left_out: Sequence[Path], empty: Sequence[Path]) -> None:
    if left_out:
        names = _listed(str(path.relative_to(folder)) for path in left_out)
        log.warning("data folder %s: left out, as no pictures: %s", folder, names)
    if empty:
        names = _listed(path.name for path in empty)
        log.warning("data folder %s: folders without pictures are no classes: %s", folder, names)


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
