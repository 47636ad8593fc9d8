"""Tables come back cell by cell, whatever wrote them; the first inputs are from public reports."""

import codecs
import gzip
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pandas
import polars
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rankfit.configs.settings import ConfigError, RunSettings, from_flat
from rankfit.tasks.data import DataError, read_data
from rankfit.tasks.records import RecordError

#: With ``data.test-fraction`` of a hundredth, one record is held out.
COUNT = 24


def settings_for(source: Path, **changes: object) -> RunSettings:
    flat = {
        "task.kind": "text-classification",
        "data.source": str(source),
        "data.test": "",
        "data.train": source.name,
    }
    return from_flat(flat | changes)  # type: ignore[operator]


def read(source: Path, **changes: object) -> list[tuple[str, str]]:
    """Every text with its class's name, in the order of the file."""
    own = settings_for(source.parent, **{"data.train": source.name, **changes})
    data = read_data(own, data_path=str(source.parent))
    assert not len(data.test)
    names = [data.class_names[label] for label in data.train.labels]
    return [(data.train.inputs[row], name) for row, name in enumerate(names)]


def pairs(texts: list[str], labels: list[str] | None = None) -> list[tuple[str, str]]:
    return list(zip(texts, labels or [str(i % 2) for i in range(len(texts))], strict=True))


def test_words_for_nothing_are_text(tmp_path: Path) -> None:
    """datasets #5583 and others: pandas takes null, n/a and None out of a CSV."""
    texts = ["null", "eng", "NA", "n/a", "None", "nan", "#N/A", "<NA>"]
    file = tmp_path / "train.csv"
    file.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts)))
    assert read(file) == pairs(texts)
    file.write_text("text,label\n" + "".join(f"case {i},{t}\n" for i, t in enumerate(texts)))
    assert [label for _, label in read(file)] == texts


def test_a_quote_at_the_start_of_a_tsv_cell_is_text(tmp_path: Path) -> None:
    lines = ["they drank the pub .", '"we yelled ourselves hoarse .', 'he said " no', "a", '"b"']
    file = tmp_path / "train.tsv"
    file.write_text("text\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(lines * 4)))
    assert read(file) == pairs(lines * 4)
    # Two such quotes make one cell of several rows for a reader of quotes, all of whose rows fit.
    file.write_text('text\tlabel\n"a .\t0\nb .\t1\nc . "\t0\n')
    assert read(file) == pairs(['"a .', "b .", 'c . "'])


def test_quotes_that_a_writer_put_around_tsv_cells_are_taken_off(tmp_path: Path) -> None:
    texts = ['say "no"', "two\nlines", "a\ttab", "plain", ""]
    file = tmp_path / "train.tsv"
    table = pandas.DataFrame({"text": texts, "label": [0, 1, 0, 1, 0]})
    table.to_csv(file, sep="\t", index=False)
    assert read(file) == pairs(texts)
    one_line = table[table.text.str.contains("no|plain")]
    one_line.to_csv(file, sep="\t", index=False)
    assert read(file) == [('say "no"', "0"), ("plain", "1")]
    one_line.to_csv(file, sep="\t", index=False, quoting=1)  # all of them
    assert read(file) == [('say "no"', "0"), ("plain", "1")]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_quotes_can_be_set(tmp_path: Path, ending: str) -> None:
    mark = {"csv": ",", "tsv": "\t"}[ending]
    file = tmp_path / f"train.{ending}"
    file.write_text(f'text{mark}label\n"a"{mark}0\nb{mark}1\n')
    assert read(file, **{"data.quotes": "text"}) == pairs(['"a"', "b"])
    assert read(file, **{"data.quotes": "quoted"}) == pairs(["a", "b"])


def test_backslashes_before_quotes(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text('text,label\n"say \\"no\\", now",0\nplain,1\n')
    assert read(file) == pairs(['say "no", now', "plain"])


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_separators_are_found(tmp_path: Path, mark: str, ending: str) -> None:
    texts = ["one", "two, or three", "four; five", "six | seven"]
    file = tmp_path / f"train.{ending}"
    table = pandas.DataFrame({"id": range(4), "text": texts, "label": [0, 1, 0, 1]})
    table.to_csv(file, sep=mark, index=False)
    assert read(file) == pairs(texts)


def test_another_separator_is_set(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("text~label\na, b; c~0\nd~1\n")
    assert read(file, **{"data.separator": "~"}) == pairs(["a, b; c", "d"])
    file.write_text("text\tlabel\na\t0\nd\t1\n")
    assert read(file, **{"data.separator": "tab"}) == pairs(["a", "d"])
    with pytest.raises(ConfigError, match="cannot separate cells; expected one character"):
        settings_for(file, **{"data.separator": "::"})


def test_rows_of_other_lengths_are_named_or_left_out(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("text,label\na,0\nhello, world,1\nb,1\nc\n")
    with pytest.raises(RecordError, match=r"row 1 \(line 3\) has 3 cells where the header has 2"):
        read(file)
    assert read(file, **{"data.bad-records": "skip"}) == [("a", "0"), ("b", "1")]
    # What spreadsheets write: separators behind the last cell, blanks in the header.
    file.write_text("text, label ,,\na,0,,\nb,1\n,,,,\n")
    assert read(file, **{"data.bad-records": "skip"}) == [("a", "0"), ("b", "1")]
    file.write_text("text,text,label\na,b,0\n")
    with pytest.raises(DataError, match="two columns are named 'text'"):
        read(file)


def test_a_column_that_is_not_used_cannot_make_a_file_unreadable(tmp_path: Path) -> None:
    records = [{"text": f"t {i}", "label": i % 2, "meta": meta} for i, meta in enumerate(
        [1, "two", None, {"a": 1}, [1, "x"], 2.5]
    )]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    assert read(tmp_path / "train.jsonl") == pairs([f"t {i}" for i in range(6)])
    lines = ["text,label,meta", *[f"t {i},{i % 2},{meta}" for i, meta in enumerate("1x2.é")]]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    assert read(tmp_path / "train.csv") == pairs([f"t {i}" for i in range(5)])
    table = pandas.DataFrame({"text": ["a", "b"], "label": pandas.Categorical(["x", "y"])})
    table["when"] = pandas.Series([pandas.Timedelta(1), pandas.NaT])
    table.to_parquet(tmp_path / "train.parquet")
    assert read(tmp_path / "train.parquet") == [("a", "x"), ("b", "y")]


def test_what_json_files_are(tmp_path: Path) -> None:
    """Records, lines, pandas' orients, and a list under one key, with a mark or without."""
    texts = ["a", "b", "c", "d"]
    table = pandas.DataFrame({"text": texts, "label": [0, 1, 0, 1]})
    records = table.to_dict("records")
    whole = {
        "records": json.dumps(records),
        "indented": json.dumps(records, indent=2),
        "lines": "\n".join(map(json.dumps, records)),
        "under a key": json.dumps({"version": 1, "data": records}),
        "indented, one after another": "\n".join(json.dumps(r, indent=1) for r in records),
        **{
            orient: table.to_json(orient=orient)
            for orient in ("columns", "split", "index", "table", "records")
        },
        "lists": json.dumps(table.to_dict("list")),
    }
    for name, text in whole.items():
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            (tmp_path / "train.json").write_text(text, encoding=encoding)
            assert read(tmp_path / "train.json") == pairs(texts), (name, encoding)
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": \n')
    with pytest.raises(DataError, match="cannot be read as json: .*line 2"):
        read(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text('["a", 0]\n["b", 1]\n')
    with pytest.raises(DataError, match="row 0 is list, expected an object"):
        read(tmp_path / "train.jsonl")


def test_encodings_are_found_or_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["Müller äußert sich", "façade, naïve", "déjà vu", "plain"]
    body = "text;label\n" + "".join(f"{text};{i % 2}\n" for i, text in enumerate(texts))
    file = tmp_path / "train.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        file.write_bytes(body.encode(encoding))
        assert read(file) == pairs(texts), encoding
    with caplog.at_level(logging.WARNING):
        for encoding in ("latin-1", "cp1252"):
            file.write_bytes(body.encode(encoding))
            assert read(file) == pairs(texts), encoding
    assert "is not UTF-8 and is read as cp1252" in caplog.text
    file.write_bytes(body.replace("plain", "€ “quoted”").encode("cp1252"))
    assert read(file)[-1][0] == "€ “quoted”"


def test_what_cannot_be_guessed_is_asked_for(tmp_path: Path) -> None:
    text = "Быстрая коричневая лиса прыгает через ленивую собаку"
    body = "text,label\n" + "".join(f"{text} {i},{i % 2}\n" for i in range(20))
    file = tmp_path / "train.csv"
    file.write_bytes(body.encode("cp1251"))
    with pytest.raises(DataError, match="neither UTF-8 nor UTF-16.*set data.encoding"):
        read(file)
    assert read(file, **{"data.encoding": "cp1251"})[3] == (f"{text} 3", "1")
    with pytest.raises(DataError, match="is not utf-8: .*set data.encoding"):
        read(file, **{"data.encoding": "utf-8"})
    with pytest.raises(ConfigError, match="Python knows no encoding 'klingon'"):
        settings_for(file, **{"data.encoding": "klingon"})


def test_line_ends(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        file = tmp_path / "train.csv"
        file.write_bytes(end.join(["text,label", "a,0", "b,1", "", "c,0", ""]).encode())
        assert read(file) == pairs(["a", "b", "c"])


def test_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(b"text,label\na,0\nb,1\n"))
    assert read(tmp_path / "train.csv.gz") == pairs(["a", "b"])
    own = settings_for(tmp_path, **{"data.train": "train"})
    assert len(read_data(own, data_path=str(tmp_path)).train) == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc says what is in memory")
def test_parquet_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column beyond the limit stays on disk; of it the rows that are asked for are read."""
    monkeypatch.setattr("rankfit.tasks.tables._IN_MEMORY_BYTES", 2**20)

    def anonymous() -> int:
        """Bytes of this process that lie in no file."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def grown(groups: int) -> int:
        folder = tmp_path / f"of-{groups}"
        folder.mkdir()
        schema = pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.int64())])
        with pyarrow.parquet.ParquetWriter(folder / "train.parquet", schema) as writer:
            for _ in range(groups):
                texts = [os.urandom(4000).hex() for _ in range(500)]
                writer.write_table(
                    pyarrow.table({"text": texts, "label": [0, 1] * 250}, schema=schema)
                )
        before = anonymous()
        data = read_data(settings_for(folder, **{"data.test-fraction": 0.1, "data.train": "train"}))
        assert sum(len(data.train.inputs[row]) for row in range(len(data.train))) > groups * 3e6
        return anonymous() - before

    grown(1)  # what the libraries take
    assert grown(32) < 32 * 4e6 / 3


# Property: what was written is what is read.

#: Characters that a file of text can hold: no zero, which is how UTF-16 is known, and no mark.
CELLS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=12
)
LATIN = st.text(st.characters(codec="latin-1", exclude_characters="\0"), max_size=12)
LABELS = st.sampled_from(["cat", "NA", "null", "dog, small", 'the "odd"', "None"])
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"]
WRITERS = ["pandas csv", "pandas tsv", "pandas semicolons", "pandas json", "pandas lines",
           "polars csv", "polars json", "polars lines", "polars parquet", "pandas parquet",
           "csv", "json", "arrow"]  # fmt: skip


def written(writer: str, texts: list[str], labels: list[str]) -> tuple[str, str | bytes]:
    """Ending and content of a file of two columns and one more."""
    columns = {"number": list(range(len(texts))), "text": texts, "label": labels}
    library, _, form = writer.partition(" ")
    table: Any = (polars if library == "polars" else pandas).DataFrame(columns)
    if writer == "csv":
        import csv

        out = io.StringIO()
        csv.writer(out).writerows([columns, *zip(*columns.values(), strict=True)])
        return "csv", out.getvalue()
    if writer == "json":
        return "json", json.dumps(table.to_dict("records"))
    if form == "parquet" or writer == "arrow":
        raw = io.BytesIO()
        if writer == "arrow":
            data = pyarrow.table(columns)
            with pyarrow.ipc.new_stream(raw, data.schema) as stream:
                stream.write_table(data)
            return "arrow", raw.getvalue()
        (table.write_parquet if library == "polars" else table.to_parquet)(raw)
        return "parquet", raw.getvalue()
    if library == "polars":
        write = {"csv": table.write_csv, "json": table.write_json, "lines": table.write_ndjson}[
            form
        ]
        out = io.BytesIO()
        write(out)
        return {"lines": "jsonl"}.get(form, form), out.getvalue().decode()
    if form == "json":
        return "json", table.to_json(orient="records", force_ascii=False)
    if form == "lines":
        return "jsonl", table.to_json(orient="records", lines=True, force_ascii=False)
    mark = {"csv": ",", "tsv": "\t", "semicolons": ";"}[form]
    return ("tsv" if form == "tsv" else "csv"), table.to_csv(index=False, sep=mark)


@settings(
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data(), writer=st.sampled_from(WRITERS), encoding=st.sampled_from(ENCODINGS))
def test_any_table_comes_back_cell_by_cell(
    tmp_path: Path, data: st.DataObject, writer: str, encoding: str
) -> None:
    cells = LATIN if encoding in ("latin-1", "cp1252") else CELLS
    rows = data.draw(st.lists(st.tuples(cells, LABELS), min_size=2, max_size=6))
    texts, labels = [row[0] for row in rows], [row[1] for row in rows]
    if writer == "pandas tsv":  # a line is a row where it can be
        assume(not any("\n" in text and "\t" in text for text in texts))
        assume(not any("\r" in text for text in texts))
    ending, content = written(writer, texts, labels)
    file = tmp_path / f"train.{ending}"
    try:
        file.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    except UnicodeEncodeError:
        assume(False)
    guessed = {} if encoding.startswith("utf") else {"data.encoding": encoding}
    assert read(file, **guessed) == list(zip(texts, labels, strict=True))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(["Straße", "façade", "naïve", "ça", "École"])))
def test_western_text_needs_no_setting(tmp_path: Path, words: list[str]) -> None:
    texts = [*words, "the end", "no, not yet"]
    content = written("pandas csv", texts, ["a"] * len(texts))[1]
    assert isinstance(content, str)
    for encoding in ENCODINGS:
        (tmp_path / "train.csv").write_bytes(content.encode(encoding))
        assert [text for text, _ in read(tmp_path / "train.csv")] == texts


def test_the_marks_are_those_of_codecs() -> None:
    """UTF-32's mark begins with UTF-16's and must be looked for first."""
    assert codecs.BOM_UTF32_LE.startswith(codecs.BOM_UTF16_LE)
