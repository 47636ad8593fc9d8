"""Tables as people have them: CSV, TSV, JSON, plain text, parquet and Arrow, cell by cell.

Text files are read by Python's own ``csv`` and ``json``: every cell stays the text that is there
(``NA``, ``null`` and ``None`` too), and a column that is not used cannot make a file unreadable.
Parquet and Arrow are memory-mapped by ``datasets``.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import logging
import lzma
import re
import string
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rankfit.configs.learning import Data
from rankfit.tasks.records import DataError, RecordError, TableError

log = logging.getLogger(__name__)

#: Endings that can be read; each may be followed by one of :data:`_COMPRESSED`.
ENDINGS = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".arrow", ".txt")
_COMPRESSED = (".gz", ".bz2", ".xz")
_MAGIC: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open,
}  # fmt: skip
#: What stands in place of a large file where a repository was cloned without Git LFS.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: A carriage return inside a cell, while the csv module reads: decoded text never holds it.
_RETURN = "\udc0d"
#: Columns up to this size are read into memory; larger ones stay memory-mapped.
_IN_MEMORY_BYTES = 2**30
#: Bytes beyond ASCII from which on a text that is mostly of them is no Western European one, and
#: where most of them stand in runs of three or more.
_FOREIGN_BYTES, _FOREIGN_RUNS = 200, 20
_RUN = re.compile(rb"[\x80-\xff]{3,}")
#: The line by which Excel is told the separator.
_DECLARED = re.compile(r"sep=(.)\s*", re.IGNORECASE)
_HIGH = bytes(range(128, 256))
_BEYOND_ASCII, _ESCAPED_BYTE = re.compile("[^\0-\x7f]"), re.compile("[\udc80-\udcff]")


class Table(ABC):
    """Columns of records, by name."""

    #: Fingerprint of content that is not told by files.
    version: str = ""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def column(self, name: str) -> Sequence[Any]:
        """Cells of a column."""

    @abstractmethod
    def records(self, names: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """Rows as mappings of some columns."""

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of the classes that a column declares; None where it does not."""
        return None

    def images(self, name: str) -> Sequence[Any] | None:
        """Pictures of a column that holds them itself; None where it holds paths.

        Raises
        ------
        DataError
            If it holds neither.
        """
        return None


@dataclass(frozen=True)
class CellTable(Table):
    """A table in memory. Cells of CSV are text; of JSON they have types; None where one is absent.

    ``wrong`` are the rows whose number of cells is not that of the header, and what is wrong.
    """

    cells: Mapping[str, list[Any]]
    wrong: Mapping[int, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """See the base class."""
        return tuple(self.cells)

    def __len__(self) -> int:
        return len(next(iter(self.cells.values()), ()))

    def column(self, name: str) -> Sequence[Any]:
        """See the base class."""
        return self.cells[name]

    def records(self, names: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """See the base class."""
        columns = [self.cells[name] for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class ArrowTable(Table):
    """A table of ``datasets``: parquet and Arrow files, ``save_to_disk`` folders, the hub."""

    data: Any

    @property
    def version(self) -> str:  # type: ignore[override]
        """Fingerprint that ``datasets`` keeps of the content."""
        return str(self.data._fingerprint)

    @property
    def names(self) -> tuple[str, ...]:
        """See the base class."""
        return tuple(self.data.column_names)

    def __len__(self) -> int:
        return len(self.data)

    def column(self, name: str) -> Sequence[Any]:
        """Cells of a column; of more than 1 GiB, read from the memory map one by one."""
        import datasets

        pictures = isinstance(self.data.features[name], datasets.Image)
        small = not pictures and self.data.data.column(name).nbytes <= _IN_MEMORY_BYTES
        cells: Sequence[Any] = self.data[name]
        return cells[:] if small else cells

    def records(self, names: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """See the base class."""
        wanted = self.data.select_columns(list(names))
        small = sum(wanted.data.column(name).nbytes for name in names) <= _IN_MEMORY_BYTES
        records: Sequence[Mapping[str, Any]] = list(wanted) if small else wanted
        return records

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """See the base class."""
        import datasets

        feature = self.data.features[name]
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def images(self, name: str) -> Sequence[Any] | None:
        """See the base class."""
        import datasets

        feature, table = self.data.features[name], self.data
        if feature in (datasets.Value("string"), datasets.Value("large_string")):
            return None
        if not isinstance(feature, datasets.Image):
            try:
                table = table.cast_column(name, datasets.Image())
            except (TypeError, ValueError) as error:
                raise TableError(
                    f"column {name!r} holds {feature}; expected pictures, the bytes of picture "
                    "files, or their paths"
                ) from error
        pictures: Sequence[Any] = table[name]
        return pictures


def ending(file: Path) -> str:
    """Ending of a file's name that says its form, without that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_table(file: Path) -> bool:
    """Whether a file has an ending that can be read as a table."""
    return ending(file) in ENDINGS


def open_table(file: Path, data: Data, likely: Sequence[str]) -> Table:
    """Read a file of text: CSV, TSV, JSON, JSON lines, plain text.

    Parameters
    ----------
    data
        ``data.encoding``, ``data.separator`` and ``data.quotes`` where they are set.
    likely
        Column names that the run could use: the separator is found by them.

    Raises
    ------
    DataError
        If it cannot be decoded or is no such file.
    """
    form = ending(file)
    refuse_pointer(file)
    encoding = data.encoding or _find_encoding(file)
    try:
        if form in (".csv", ".tsv"):
            return _read_separated(file, form, encoding, data, likely)
        if form == ".txt":
            lines = [line.rstrip("\r\n") for line in _lines(file, encoding, "\n")]
            return CellTable({"text": [line for line in lines if line.strip()]})
        return _columns_of(_read_json(file, encoding, likely))
    except UnicodeError as error:
        raise TableError(
            f"data {file}: is not {encoding}: {error}; set data.encoding to the file's"
        ) from error
    except LookupError as error:
        raise TableError(f"data.encoding {encoding!r}: Python knows no such encoding") from error
    except OSError as error:
        raise TableError(f"data {file}: cannot be read: {error}") from error


def open_arrow(files: Sequence[Path], columns: Callable[[Sequence[str]], Sequence[str]]) -> Table:
    """Memory-map parquet or Arrow files; ``columns`` says which are read of those that are there.

    Raises
    ------
    DataError
        If they cannot be read.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    form = ending(files[0])
    for file in files:
        refuse_pointer(file)
    with quiet():
        try:
            if form == ".parquet":
                wanted = list(columns(pyarrow.parquet.read_schema(files[0]).names))
                builder = datasets.load_dataset_builder(
                    "parquet", data_files=[str(file) for file in files], columns=wanted
                )
            else:
                builder = datasets.load_dataset_builder(
                    "arrow", data_files=[str(file) for file in files]
                )
            builder.download_and_prepare()
            if not builder.info.splits["train"].num_examples:
                raise TableError(f"data {files[0]}: the set is empty", fault="data-empty")
            return ArrowTable(builder.as_dataset(split="train"))
        except DataError:
            raise
        except (
            OSError,
            ValueError,
            TypeError,
            pyarrow.ArrowException,
            datasets.exceptions.DatasetGenerationError,
        ) as error:
            cause = error.__cause__ or error
            raise TableError(f"data {files[0]}: cannot be read as {form[1:]}: {cause}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep ``datasets`` from drawing progress bars, and give the setting back."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# Encodings


def refuse_pointer(file: Path) -> None:
    """Refuse what stands in place of a file that Git LFS was to bring.

    Raises
    ------
    DataError
        If it is that.
    """
    try:
        with file.open("rb") as stream:
            pointer = stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return  # whoever reads it says why
    if pointer:
        raise TableError(
            f"data {file}: is a pointer of Git LFS in place of the file: fetch it with `git lfs "
            "pull`, or `hf download`"
        )


def _open(file: Path) -> IO[bytes]:
    """Open a file, unpacked by what it holds: names do not always say that it is compressed."""
    with file.open("rb") as stream:
        head = stream.read(max(map(len, _MAGIC)))
    unpack = next((how for magic, how in _MAGIC.items() if head.startswith(magic)), None)
    unpacked: IO[bytes] = file.open("rb") if unpack is None else unpack(file)
    return unpacked


def _find_encoding(file: Path) -> str:
    """Encoding of a text file: by its mark, else UTF-8 or UTF-16 if it is that, else cp1252.

    Raises
    ------
    DataError
        If it is none of them and does not look like Western European text, or UTF-8 with a few
        bytes that are not.
    """
    with _open(file) as stream:
        head = stream.read(4096)
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return encoding
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 8:  # ASCII characters in UTF-16 have a zero byte each
        return "utf-16-le" if odd > even else "utf-16-be"
    if _is_utf8(file):
        return "utf-8"
    _refuse_broken(file)
    high = letters = runs = 0
    undefined = False
    with _open(file) as stream:
        while block := stream.read(2**20):
            high += len(block) - len(block.translate(None, _HIGH))
            letters += len(block) - len(block.translate(None, string.ascii_letters.encode()))
            runs += sum(map(len, _RUN.findall(block)))
            undefined |= any(byte in block for byte in b"\x81\x8d\x8f\x90\x9d")
    if high > max(_FOREIGN_BYTES, letters) or runs > max(_FOREIGN_RUNS, high // 2):
        raise TableError(
            f"data {file}: is neither UTF-8 nor UTF-16, and of whole words of characters beyond "
            "ASCII: set data.encoding to the file's (such as cp1251, gb18030 or shift_jis)"
        )
    found = "latin-1" if undefined else "cp1252"
    log.warning("data %s: is not UTF-8 and is read as %s (data.encoding sets it)", file, found)
    return found


def _refuse_broken(file: Path) -> None:
    """Refuse UTF-8 with some bytes that are not: in no other encoding is the rest what it was.

    Raises
    ------
    TableError
        If there are more characters of UTF-8 beyond ASCII than bytes that are none.
    """
    broken = valid = lines = 0
    first = 0
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with _open(file) as stream:
        while block := stream.read(2**20):
            text = decoder.decode(block)
            bad = _ESCAPED_BYTE.findall(text)
            if bad and not broken:
                first = lines + text[: text.index(bad[0])].count("\n") + 1
            broken += len(bad)
            valid += len(_BEYOND_ASCII.findall(text)) - len(bad)
            lines += text.count("\n")
    if valid > broken:
        raise TableError(
            f"data {file}: is UTF-8, but for {broken} bytes that are not, the first in line "
            f"{first}: mend the file, or set data.encoding if it is another"
        )


def _is_utf8(file: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(file) as stream:
        try:
            while block := stream.read(2**20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _lines(file: Path, encoding: str, newline: str) -> Iterator[str]:
    with _open(file) as stream, io.TextIOWrapper(stream, encoding=encoding, newline=newline) as own:
        first = True
        for line in own:
            yield line.removeprefix("\ufeff") if first else line
            first = False


# CSV and TSV


@dataclass(frozen=True)
class _Quoting:
    """How cells are told apart: by quotes as in RFC 4180, with backslashes, or not at all."""

    name: str
    arguments: Mapping[str, Any]


_QUOTED = _Quoting("quoted", {"doublequote": True})
_ESCAPED = _Quoting("escaped", {"doublequote": False, "escapechar": "\\"})
_LITERAL = _Quoting("text", {"quoting": csv.QUOTE_NONE})


@dataclass(frozen=True)
class _Parsed:
    """Rows of one reading, the first of them the header; ``error`` if it broke off."""

    rows: list[list[str]]
    ends: list[int]
    error: str

    @property
    def whole(self) -> bool:
        """Whether every row has the header's number of cells."""
        return not self.error and all(len(row) == len(self.rows[0]) for row in self.rows)


@dataclass(frozen=True)
class _Text:
    """A separated file as text: where it lies, and how its lines end."""

    file: Path
    encoding: str
    newline: str
    #: Separator that the first line says to Excel, which is no row ("" = there is none).
    declared: str = ""

    @classmethod
    def of(cls, file: Path, encoding: str) -> "_Text":
        """Find out how the lines end: a return inside a cell is content, not an end."""
        feeds = pairs = 0
        returns = False
        said = _DECLARED.fullmatch(next(_lines(file, encoding, ""), ""))
        declared = said.group(1) if said else ""
        for line in _lines(file, encoding, "\n"):
            feeds += line.endswith("\n")
            pairs += line.endswith("\r\n")
            returns |= "\r" in line
        if not feeds and returns:
            return cls(file, encoding, "\r", declared)
        return cls(file, encoding, "\r\n" if 2 * pairs >= max(feeds, 1) else "\n", declared)

    def lines(self) -> Iterator[str]:
        """Lines for the csv module, returns inside of them replaced."""
        first = int(bool(self.declared))
        if self.newline == "\r":
            yield from islice(_lines(self.file, self.encoding, ""), first, None)
            return
        for line in islice(_lines(self.file, self.encoding, "\n"), first, None):
            if "\r" not in line:
                yield line
            elif self.newline == "\r\n" and line.endswith("\r\n"):
                yield line[:-2].replace("\r", _RETURN) + "\r\n"
            else:
                yield line.replace("\r", _RETURN)

    def parse(self, separator: str, quoting: _Quoting, most: int = sys.maxsize) -> _Parsed:
        """Read the first rows; blank lines are no rows."""
        rows: list[list[str]] = []
        ends: list[int] = []
        reader = csv.reader(self.lines(), delimiter=separator, strict=True, **quoting.arguments)
        with _large_cells():
            try:
                for row in reader:
                    if row:
                        width = len(rows[0]) if rows else 1
                        while len(row) > width and not row[-1]:
                            row.pop()  # separators behind the last cell, as spreadsheets write
                        rows.append([cell.replace(_RETURN, "\r") for cell in row])
                        ends.append(reader.line_num + bool(self.declared))
                    if len(rows) == most:
                        break
            except csv.Error as error:
                return _Parsed(rows, ends, f"line {reader.line_num}: {error}")
        return _Parsed(rows, ends, "")


@contextlib.contextmanager
def _large_cells() -> Iterator[None]:
    """Let the csv module read cells of any length."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_separated(
    file: Path, form: str, encoding: str, data: Data, likely: Sequence[str]
) -> CellTable:
    text = _Text.of(file, encoding)
    separator = data.separator or text.declared or _find_separator(text, form, likely)
    parsed = _parse_whole(text, form, separator, data.quotes)
    if not parsed.rows:
        raise TableError(f"data {file}: is empty; expected a header and rows", fault="data-empty")
    header, rows, ends = parsed.rows[0], parsed.rows[1:], parsed.ends[1:]
    if parsed.error:
        raise TableError(
            f"data {file}: {parsed.error}; a quote that is text in itself needs data.quotes=text"
        )
    names = [name.strip() for name in header]
    double = next((name for name in likely if names.count(name) > 1), None)
    if double is not None:
        raise TableError(f"data {file}: two columns are named {double!r}")
    width = len(header)
    wrong = {
        number: f"(line {end}) has {len(row)} cells where the header has {width}"
        for number, (row, end) in enumerate(zip(rows, ends, strict=True))
        if len(row) != width
    }
    full = [row if len(row) == width else [""] * width for row in rows]
    cells = [list(column) for column in zip(*full, strict=True)] or [[] for _ in header]
    return CellTable(dict(zip(names, cells, strict=True)), wrong)


def _find_separator(text: _Text, form: str, likely: Sequence[str]) -> str:
    """The separator that finds most of the likely columns in the header, or else most columns."""

    def worth(separator: str) -> tuple[int, int]:
        rows = text.parse(separator, _QUOTED, most=1).rows or text.parse(
            separator, _LITERAL, most=1
        ).rows  # fmt: skip
        header = {name.strip().casefold() for name in rows[0]} if rows else set()
        return len(header & {name.casefold() for name in likely}), len(header)

    usual = _SEPARATORS[form]
    found = max(usual, key=lambda separator: (worth(separator), -usual.index(separator)))
    if found != usual[0]:
        log.info("data %s: cells are separated by %r", text.file, found)
    return found


def _parse_whole(text: _Text, form: str, separator: str, quotes: str) -> _Parsed:
    """Read all rows with the first meaning of quotes that gives every row the header's cells.

    In a ``.csv`` quotes enclose cells, if that can be. In a ``.tsv`` each line is a row, if that
    can be: a quote at the start of a cell, as in GLUE's files, is then text, unless the writer
    evidently put it there.
    """
    if quotes == "text":
        return text.parse(separator, _LITERAL)
    if quotes == "quoted":
        return text.parse(separator, _QUOTED)
    lines: _Parsed | None = None
    if form == ".tsv":
        lines = text.parse(separator, _LITERAL)
        if lines.whole and not _by_a_writer(lines.rows, separator):
            return lines
    read = []
    for quoting in (_QUOTED, _ESCAPED):
        parsed = text.parse(separator, quoting)
        if parsed.whole and not (lines and lines.whole and len(lines.rows) != len(parsed.rows)):
            return parsed
        read.append(parsed)
    lines = lines or text.parse(separator, _LITERAL)
    if lines.whole:
        log.info("data %s: quotes are text (data.quotes)", text.file)
        return lines
    return read[0] if not read[0].error else lines


def _by_a_writer(rows: Sequence[Sequence[str]], separator: str) -> bool:
    """Whether quotes around cells are a writer's: it puts them where they are needed, or always."""
    special = re.compile(f'[",;\\\\{re.escape(separator)}]')
    for column in zip(*rows, strict=True):
        cells = [cell for cell in column[1:] if cell]
        quoted = [len(c) > 1 and c[0] == c[-1] == '"' for c in cells]
        if any('"' in cell for cell, q in zip(cells, quoted, strict=True) if not q):
            return False
        needed = [q and bool(special.search(c[1:-1])) for c, q in zip(cells, quoted, strict=True)]
        if any(q and not n for q, n in zip(quoted, needed, strict=True)) and not all(quoted):
            return False
    return True


# JSON


def _read_json(file: Path, encoding: str, likely: Sequence[str]) -> list[Any]:
    """Read JSON lines, a list of records, or one of the tables that pandas writes."""
    lines = _lines(file, encoding, "\n")
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):  # else it is one value of several lines
            records = [json.loads(line) for line in (first, *lines) if line.strip()]
            if len(records) > 1:
                return records
    whole = "".join(_lines(file, encoding, ""))
    try:
        return _unwrapped(_values(whole), likely)
    except ValueError as error:
        raise TableError(f"data {file}: cannot be read as json: {error}") from error


def _values(text: str) -> list[Any]:
    """JSON values that follow one another."""
    decoder, values, place = json.JSONDecoder(), [], 0
    text = text.strip()
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        values.append(value)
        while place < len(text) and text[place].isspace():
            place += 1
    return values


def _unwrapped(values: list[Any], likely: Sequence[str]) -> list[Any]:
    """Records of a file's values: pandas' orients, columns of lists, a list under one key."""
    if len(values) != 1:
        return values
    value = values[0]
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError(f"it holds {type(value).__name__}, expected records")
    if {"columns", "data"} <= set(value) and set(value) <= {"columns", "data", "index"}:
        return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    if set(value) == {"schema", "data"} and isinstance(value["data"], list):
        return list(value["data"])
    cells = list(value.values())
    if set(value) & set(likely) and all(isinstance(cell, list) for cell in cells):
        if all(len(cell) == len(cells[0]) for cell in cells) and not _is_chat(value):
            return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]
        return [value]
    if all(isinstance(cell, dict) for cell in cells):
        if set(value) & set(likely):  # by column
            index = list(dict.fromkeys(key for cell in cells for key in cell))
            return [{name: value[name].get(key) for name in value} for key in index]
        return cells
    lists = [cell for cell in cells if isinstance(cell, list) and all(map(_is_dict, cell))]
    inside = len(lists) == 1 and not set(value) & set(likely)
    return lists[0] if inside else [value]


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_chat(value: Mapping[str, Any]) -> bool:
    """Whether lists are the turns of one conversation rather than columns."""
    return any(
        isinstance(cell, list) and cell and all(_is_dict(turn) for turn in cell)
        and {"role", "from"} & set(cell[0])
        for cell in value.values()
    )  # fmt: skip


def _columns_of(records: Sequence[Any]) -> CellTable:
    """Records as columns; a key that a record does not have is None."""
    names: dict[str, None] = {}
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise TableError(f"row {row} is {type(record).__name__}, expected an object with names")
        names.update(dict.fromkeys(record))
    return CellTable({name: [record.get(name) for record in records] for name in names})


def refuse_wrong_rows(table: Table, origin: str, *, skip: bool) -> list[int]:
    """Rows that are whole; others are refused, or left out with ``skip``.

    Raises
    ------
    RecordError
        For the first row that is not whole.
    """
    wrong = table.wrong if isinstance(table, CellTable) else {}
    if wrong and not skip:
        row = min(wrong)
        raise RecordError(origin, row, wrong[row], "cells")
    return [row for row in range(len(table)) if row not in wrong]
