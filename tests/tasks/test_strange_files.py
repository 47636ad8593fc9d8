"""Files as people found them: of public reports, each a kind that once went wrong without a word.

Two start tokens (OpenRLHF #393), lists in CSV as Python writes them, Git LFS pointers in place of
files, Excel's ``sep=`` line, Windows' separators, GBK read as Western text, conversations that the
assistant opens (ShareGPT), calls of tools that a template leaves out.
"""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image

from rankfit.tasks import load_task
from rankfit.tasks.data import DataError, read_data
from rankfit.tasks.records import RecordError
from tests.tasks.test_bad_records import save_words, settings_for, write_pictures
from tests.tasks.test_forms import TURNS, load, models, texts

__all__ = ["models"]

ROWS = "".join(f"text {row},{row % 2}\n" for row in range(10))
TABLE = "text,label\n" + ROWS


def found(file: Path, content: str | bytes, **changes: object) -> list[tuple[Any, str]]:
    """Texts and classes that a file gives, all of its rows."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    changes = {"data.test-fraction": 0.3, **changes}
    data = read_data(settings_for(file, "text-classification", **changes))
    return sorted(
        (examples.inputs[row], data.class_names[label])
        for examples in (data.train, data.test)
        for row, label in enumerate(examples.labels)
    )


EXPECTED = [(f"text {row}", str(row % 2)) for row in range(10)]


def test_the_line_that_tells_excel_the_separator_is_no_header(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    for end in ("\n", "\r\n", "\r"):
        for mark in ",;~":
            content = f"sep={mark}\n{TABLE.replace(',', mark)}".replace("\n", end)
            assert found(file, content) == EXPECTED
    with pytest.raises(RecordError, match=r"row 10 \(line 13\) has 3 cells"):
        found(file, f"sep=;\n{TABLE.replace(',', ';')}one;two;3\n")


def test_compressed_is_what_a_file_holds_and_not_its_name(tmp_path: Path) -> None:
    assert found(tmp_path / "train.csv", gzip.compress(TABLE.encode())) == EXPECTED
    assert found(tmp_path / "train.csv.gz", TABLE) == EXPECTED


def test_columns_are_found_whatever_their_case(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    assert found(file, f"Text,LABEL\n{ROWS}") == EXPECTED
    assert found(file, f"Text;Label\n{ROWS.replace(',', ';')}") == EXPECTED
    both = "Text,TEXT,label\n" + "".join(f"a,b,{row % 2}\n" for row in range(10))
    with pytest.raises(DataError, match="no column 'text'; the columns are Text, TEXT, label"):
        found(file, both)


@pytest.mark.parametrize("encoding", ["gb18030", "shift_jis", "cp1251", "koi8-r", "euc-kr"])
def test_other_scripts_are_asked_about(tmp_path: Path, encoding: str) -> None:
    word = {"gb18030": "你好世界", "shift_jis": "こんにちは世界", "euc-kr": "안녕하세요"}.get(
        encoding, "здравствуйте"
    )
    content = "text,label\n" + "".join(f"{word} {row},{row % 2}\n" for row in range(10))
    with pytest.raises(DataError, match=r"set data\.encoding"):
        found(tmp_path / "train.csv", content.encode(encoding))
    read = found(tmp_path / "train.csv", content.encode(encoding), **{"data.encoding": encoding})
    assert read == [(f"{word} {row}", str(row % 2)) for row in range(10)]


def test_a_broken_byte_does_not_make_other_text_of_the_rest(tmp_path: Path) -> None:
    file, content = tmp_path / "train.csv", f"{TABLE}über,0\nça va,1\n".encode()
    with pytest.raises(
        DataError, match="UTF-8, but for 1 bytes that are not, the first in line 14"
    ):
        found(file, content + b"bad \xff byte,1\n")
    assert len(found(file, content)) == 12


def test_pointers_of_git_lfs_are_told_from_files(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 123\n"
    for name in ("train.csv", "train.json", "train.parquet", "train.txt"):
        with pytest.raises(DataError, match="pointer of Git LFS.*git lfs pull"):
            found(tmp_path / name, pointer)
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "cat" / "3.png").write_text(pointer)
    with pytest.raises(RecordError, match="row 3 cannot be read.*pointer of Git LFS"):
        _ = load_task(settings_for(tmp_path / "pictures", "image-classification")).train


def test_blanks_around_labels_make_no_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells = ["pos", " neg", "pos ", "neg"]
    content = "text,label\n" + "".join(f"text {row},{cells[row % 4]}\n" for row in range(12))
    assert {name for _, name in found(tmp_path / "train.csv", content)} == {"pos", "neg"}
    with caplog.at_level(logging.WARNING):
        names = {n for _, n in found(tmp_path / "train.csv", content.replace("pos ", "Pos"))}
    assert names == {"pos", "Pos", "neg"} and "Pos, pos are different classes" in caplog.text


def test_codes_of_any_size_are_refused_by_name(tmp_path: Path) -> None:
    rows = [{"text": f"text {row}", "label": 10**20 + row % 2} for row in range(8)]
    with pytest.raises(DataError, match=f"data.class-names={10**20},{10**20 + 1}"):
        found(tmp_path / "train.json", json.dumps(rows))


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    """One output would be trained as a regression; ``cat.0.png`` in one folder are such files."""
    for row in range(8):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / f"{('cat', 'dog')[row % 2]}.{row}.png")
    with pytest.raises(DataError, match=r"one class alone.*a folder for each"):
        _ = load_task(settings_for(tmp_path, "image-classification")).labels
    with pytest.raises(DataError, match="one class alone"):
        changes = {"data.class-names": "cat"}
        _ = load_task(settings_for(tmp_path, "image-classification", **changes)).labels


def test_paths_that_windows_wrote(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images")
    lines = [f"images\\{'cat' if row % 2 else 'dog'}\\{row}.png,{row % 2}" for row in range(10)]
    (tmp_path / "train.csv").write_text("\n".join(["image,label", *lines]))
    changes = {"data.test-fraction": 0.3}
    task = load_task(settings_for(tmp_path, "image-classification", **changes))
    assert len(task.train) + len(task.test) == 10


def test_a_message_does_not_quote_a_whole_record(tmp_path: Path) -> None:
    rows = [{"text": ["word"] * 10_000, "label": 0}, *({"text": "a", "label": 1},) * 9]
    with pytest.raises(RecordError, match="row 0 holds") as caught:
        found(tmp_path / "train.json", json.dumps(rows))
    assert len(str(caught.value)) < 700


def test_half_a_character_is_a_bad_record(tmp_path: Path) -> None:
    """An emoji that was cut in two is no text for a tokenizer."""
    lines = [json.dumps({"text": "good film", "label": row % 2}) for row in range(20)]
    lines[4] = lines[4].replace("good", "\\ud83d")
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    changes = {"model.source": save_words(tmp_path / "model")}
    with pytest.raises(RecordError, match="row 4 ") as caught:
        _ = load_task(settings_for(tmp_path, "text-classification", **changes)).train
    assert (caught.value.row, caught.value.fault) == (4, "encoding")
    changes |= {"data.bad-records": "skip"}
    task = load_task(settings_for(tmp_path, "text-classification", **changes))
    assert len(task.train) + len(task.test) == 19


# Conversations


def test_a_list_in_a_csv_as_pandas_writes_it(models: dict[str, Path], tmp_path: Path) -> None:
    record = {"messages": TURNS}
    whole = texts(load(tmp_path, models["tools"], [record] * 4))
    (tmp_path / "train.jsonl").unlink()
    pandas.DataFrame([record] * 4).to_csv(tmp_path / "train.csv", index=False)
    task = load_task(load(tmp_path, models["tools"], [record]).settings)
    (tmp_path / "train.jsonl").unlink()
    assert texts(task) == whole  # type: ignore[arg-type]
    odd = "[{'role': 'user', 'content': __import__('os').getcwd()}]"
    pandas.DataFrame({"messages": [odd] * 4}).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(RecordError, match="expected a list, as JSON"):
        _ = load_task(task.settings).train


def test_a_conversation_that_the_assistant_opens(models: dict[str, Path], tmp_path: Path) -> None:
    opened = [{"role": "assistant", "content": "hello"}, *TURNS]
    whole, target = texts(load(tmp_path, models["tools"], [{"messages": opened}] * 4))
    assert whole == "<assistant>hello</s><user>Name a fruit.</s><assistant>apple</s>"
    assert target == "apple</s>"
    with pytest.raises(RecordError, match="row 0 has no answer that follows something"):
        _ = load(tmp_path, models["tools"], [{"messages": opened[:1]}] * 4).train


def test_calls_that_a_template_leaves_out_are_no_empty_answers(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """OpenAI's arguments are JSON text; a template writes them as the mapping that they are."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    _, target = texts(load(tmp_path, models["tools"], [{"messages": turns}] * 4))
    assert target == "[call weather]</s>"
    with pytest.raises(RecordError, match="row 0 calls the tool 'weather', which the tokenizer's"):
        _ = load(tmp_path, models["strict"], [{"messages": turns}] * 4).train


def test_a_text_that_holds_its_start_and_end_has_them_once(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for text in ("one two", "<s>one two", "one two</s>", "<s>one two</s>"):
        whole, target = texts(load(tmp_path, models["tools"], [{"text": text}] * 4))
        assert (whole, target) == ("<s>one two</s>", "one two</s>")
    record = {"prompt": "<s>[INST] hi [/INST] ", "completion": "yo</s>"}
    task = load(tmp_path, models["tools"], [record] * 4)
    assert texts(task) == ("<s>[INST] hi [/INST] yo</s>", "yo</s>")
    passage = task.passages(task.train, [0])[0]
    asked = task.encoder.prompt(passage, 64)
    assert task.encoder.tokenizer.decode(asked).count("<s>") == 1


def test_tokens_of_a_set_that_is_larger_than_memory_are_not_stored(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankfit.tasks.language_model._STORED_TOKENS", 20)
    task = load(tmp_path, models["tools"], [{"text": "one two three"}] * 40)
    rows = range(len(task.train))
    first, again = task.train.collate(rows), task.train.collate(rows)
    assert all((first[name] == again[name]).all() for name in first)
    stored = task.train._kept  # type: ignore[attr-defined]
    assert 0 < sum(len(encoded.tokens) for encoded in stored.values()) <= 20
    assert set(task.train.lengths([0, 39 - 1])) == {first["input_ids"].shape[1]}


def test_answers_that_are_not_to_be_learnt(models: dict[str, Path], tmp_path: Path) -> None:
    """OpenAI's ``weight`` of 0, axolotl's ``train`` of false; an empty answer is a mistake."""
    for mark in ({"weight": 0}, {"train": False}):
        turns = [TURNS[0], {**TURNS[1], "content": "pear", **mark}, *TURNS]
        whole, target = texts(load(tmp_path, models["tools"], [{"messages": turns}] * 4))
        assert "<assistant>pear</s>" in whole and target == "apple</s>"
        with pytest.raises(RecordError, match="row 0 has no token to learn"):
            _ = load(tmp_path, models["tools"], [{"messages": turns[:2]}] * 4).train
    shared = [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": " "}]
    with pytest.raises(RecordError, match="row 0 has an empty answer"):
        _ = load(tmp_path, models["tools"], [{"conversations": shared}] * 4).train


def test_a_call_in_the_old_form(models: dict[str, Path], tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    turns = [TURNS[0], {"role": "assistant", "content": None, "function_call": call},
             {"role": "function", "name": "weather", "content": "sunny"}, TURNS[1]]  # fmt: skip
    _, target = texts(load(tmp_path, models["tools"], [{"messages": turns}] * 4))
    assert target == "[call weather]</s>apple</s>"


def test_a_letter_and_its_accent_are_one_letter(tmp_path: Path) -> None:
    """A Mac names a folder ``café`` with five characters, ``data.class-names`` has four."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    for at, name in enumerate((composed, apart)):
        rows = [{"text": f"text {row}", "label": (name, "tea")[row % 2]} for row in range(10)]
        read = found(tmp_path / f"{at}.json", json.dumps(rows))
        assert {label for _, label in read} == {composed, "tea"}
        declared = {"data.class-names": f"tea,{composed}"}
        assert found(tmp_path / f"{at}.json", json.dumps(rows), **declared) == read
