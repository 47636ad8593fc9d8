"""Records that cannot be used: refused by name, or counted and left out if the settings say so."""

import json
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rankfit.configs.settings import RunSettings, from_flat
from rankfit.tasks import data, load_task, readers
from rankfit.tasks.classification import PlainProcessor
from rankfit.tasks.data import DataError, read_data
from rankfit.tasks.partition import PartitionError, partition_of
from rankfit.tasks.records import RecordError

SKIP = {"data.bad-records": "skip"}


def settings_for(folder: Path, kind: str, **changes: object) -> RunSettings:
    flat = {
        "task.kind": kind,
        "data.source": str(folder),
        "data.test": "",
        "data.test-fraction": 0.1,
    }
    return from_flat(flat | changes)  # type: ignore[operator]


def write(folder: Path, records: list[dict[str, object]]) -> None:
    (folder / "train.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": None, "label": 0}, "row 3 holds None, expected text"),
        ({"text": "x", "label": -1}, "row 3 has label -1; expected 0 … 1"),
    ],
)
def test_texts_and_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: dict[str, object], message: str
) -> None:
    good: list[dict[str, object]] = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
    write(tmp_path, [*good[:3], bad, *good[3:]])
    with pytest.raises(DataError, match=message):
        read_data(settings_for(tmp_path, "text-classification"))
    with caplog.at_level(logging.WARNING):
        found = read_data(settings_for(tmp_path, "text-classification", **SKIP))
    assert len(found.train) + len(found.test) == 40
    assert "1 records with" in caplog.text and "left out" in caplog.text


def test_a_missing_label(tmp_path: Path) -> None:
    good: list[dict[str, object]] = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
    write(tmp_path, [*good, {"text": "x", "label": None}])
    with pytest.raises(DataError, match="row 40 has no label"):
        read_data(settings_for(tmp_path, "text-classification"))
    found = read_data(settings_for(tmp_path, "text-classification", **SKIP))
    assert found.class_names == ("a", "b") and len(found.train) + len(found.test) == 40


def test_numbers_of_a_regression(tmp_path: Path) -> None:
    good: list[dict[str, object]] = [{"text": f"text {i}", "label": i / 10} for i in range(40)]
    write(tmp_path, [*good, {"text": "x", "label": None}])
    changes = {"task.problem": "regression"}
    with pytest.raises(DataError, match="row 40 has label nan|row 40 has label None"):
        read_data(settings_for(tmp_path, "text-classification", **changes))
    found = read_data(settings_for(tmp_path, "text-classification", **changes, **SKIP))
    assert found.train.targets is not None
    assert found.train.targets.dtype == np.float32 and found.class_names == ()


@pytest.mark.parametrize(
    ("changes", "bad", "message"),
    [
        ({}, {"instruction": "a", "output": ""}, "row 0 holds '' in column 'output'"),
        ({"data.format": "messages"}, {"messages": []}, "expected a list of messages"),
        (
            {"data.format": "messages"},
            {"messages": [{"role": "robot", "content": "a"}]},
            "expected role",
        ),
        (
            {"data.format": "messages"},
            {"messages": [{"role": "user", "content": "a"}]},
            "another role than assistant",
        ),
        ({"data.format": "text"}, {"text": " "}, "expected text"),
    ],
)
def test_language_records(
    tmp_path: Path, changes: dict[str, object], bad: dict[str, object], message: str
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    fields = {"instruction": "a", "output": "b", "messages": messages, "text": "a"}
    good = [{name: fields[name] for name in bad} for _ in range(20)]
    write(tmp_path, [bad, *good])
    with pytest.raises(DataError, match=message):
        read_data(settings_for(tmp_path, "causal-lm", **changes))
    found = read_data(settings_for(tmp_path, "causal-lm", **changes, **SKIP))
    assert len(found.train) + len(found.test) == 20


def test_a_missing_column_of_language_data_is_named(tmp_path: Path) -> None:
    write(tmp_path, [{"instruction": "a", "verdict": "b"}] * 4)
    with pytest.raises(DataError, match="columns instruction, verdict are those of no known form"):
        read_data(settings_for(tmp_path, "causal-lm"))
    named = {"data.format": "instruction"}
    with pytest.raises(DataError, match="no column 'output'; the columns are instruction, verdict"):
        read_data(settings_for(tmp_path, "causal-lm", **named))
    named = {"data.input-column": "instruction,verdict"}
    assert len(read_data(settings_for(tmp_path, "causal-lm", **named)).train) == 3


def test_broken_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(10):
            Image.new("RGB", (8, 8), label == "cat" and "red" or "blue").save(
                tmp_path / label / f"{number}.png"
            )
    (tmp_path / "cat" / "10.png").write_bytes(b"no picture")
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    (tmp_path / "cat" / "11.png").write_bytes(whole[: len(whole) // 2])
    task = load_task(settings_for(tmp_path, "image-classification"))
    with pytest.raises(DataError, match=r"row 2 cannot be read: .*10\.png: it holds no picture"):
        _ = task.train
    with caplog.at_level(logging.WARNING):
        task = load_task(settings_for(tmp_path, "image-classification", **SKIP))
        assert len(task.train) + len(task.test) == 20
    assert "2 records" in caplog.text
    assert task.train.collate(range(len(task.train)))["pixel_values"].isfinite().all()


def test_nothing_left(tmp_path: Path) -> None:
    write(tmp_path, [{"text": None, "label": 0}] * 3)
    with pytest.raises(DataError, match="the set is empty"):
        read_data(settings_for(tmp_path, "text-classification", **SKIP))


def test_an_empty_partition_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [{"text": f"text {i}", "label": i % 2} for i in range(20)])
    found = read_data(settings_for(tmp_path, "text-classification"))
    with pytest.raises(PartitionError, match="18 examples cannot give each of 19 clients"):
        settings = settings_for(tmp_path, "text-classification", **{"partition.min-samples": 0})
        partition_of(found.train, settings, 19)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I", "F", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_mode(mode: str, channels: int) -> None:
    """The same half-grey picture, whatever it is saved as."""
    values = np.full((8, 8), 128, dtype=np.uint8)
    grey = Image.fromarray(values)
    image = {
        "I": lambda: Image.fromarray(values.astype(np.int32) * 257),
        "F": lambda: Image.fromarray(values.astype(np.float32) / 255),
        "I;16": lambda: Image.fromarray(values.astype(np.uint16) * 257),
        "1": lambda: Image.fromarray(values > 0),
        "P": lambda: grey.convert("P"),  # of RGB it would be dithered
    }.get(mode, lambda: grey.convert("RGB").convert(mode))()
    assert image.mode == mode
    pixels = PlainProcessor(channels, 8, 8)(image)
    assert pixels.shape == (channels, 8, 8)
    expected = 1.0 if mode == "1" else 128 / 255
    assert torch.allclose(pixels, torch.full_like(pixels, expected), atol=0.01)


def test_transparent_pixels_are_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (PlainProcessor(3, 8, 8)(clear) == 1).all()


def save_words(folder: Path) -> str:
    """A text classifier whose tokenizer, like GPT-2's, adds no token to a text."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "good", "film"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    config = BertConfig(vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("empty", ["", "  "])
def test_texts_without_a_token(tmp_path: Path, ending: str, empty: str) -> None:
    model = save_words(tmp_path / "model")
    rows = [
        {"text": empty if row in (4, 9) else "good film", "label": row % 2} for row in range(20)
    ]
    if ending == "csv":
        lines = [f'"{row["text"]}",{row["label"]}' for row in rows]
        (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]))
    else:
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"model.source": model}
    with pytest.raises(RecordError, match="row 4 holds .*which has no tokens") as caught:
        _ = load_task(settings_for(tmp_path, "text-classification", **changes)).train
    assert (caught.value.row, caught.value.fault) == (4, "encoding")
    task = load_task(settings_for(tmp_path, "text-classification", **changes, **SKIP))
    assert len(task.train) + len(task.test) == 18
    assert task.train.collate(range(len(task.train)))["input_ids"].shape[1] == 2


def write_pictures(folder: Path) -> None:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), "red").save(folder / label / f"{number}.png")


def bomb(width: int, height: int) -> bytes:
    """The head of a PNG that says to have so many pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = zlib.compress(bytes(64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize("where", ["folder", "table"])
@pytest.mark.parametrize("broken", ["truncated", "bomb", "no picture", "empty file"])
def test_pictures_that_cannot_be_trained_on(tmp_path: Path, where: str, broken: str) -> None:
    write_pictures(tmp_path / "data")
    whole = (tmp_path / "data" / "cat" / "0.png").read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2], "bomb": bomb(20_000, 10_000),
        "no picture": b"no picture", "empty file": b"",
    }[broken]  # fmt: skip
    (tmp_path / "data" / "cat" / "3.png").write_bytes(content)
    source = tmp_path / "data"
    if where == "table":
        files = sorted((tmp_path / "data").glob("*/*.png"))
        images = [{"bytes": file.read_bytes(), "path": None} for file in files]
        labels = [file.parent.name for file in files]
        source = tmp_path / "train.parquet"
        Dataset.from_dict({"image": images, "label": labels}).to_parquet(source)
    with pytest.raises(RecordError, match="row 3 cannot be read") as caught:
        _ = load_task(settings_for(source, "image-classification")).train
    assert (caught.value.row, caught.value.fault) == (3, "input")
    task = load_task(settings_for(source, "image-classification", **SKIP))
    assert len(task.train) + len(task.test) == 19
    assert task.train.collate(range(len(task.train)))["pixel_values"].isfinite().all()


def test_what_was_found_is_kept_until_the_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of a simulation do not decode everything once more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_pictures(tmp_path / "data")
    (tmp_path / "data" / "cat" / "3.png").write_bytes(b"no picture")
    opened: list[str] = []
    before = readers.ImageFiles.__getitem__

    def count(self: readers.ImageFiles, index: int) -> object:
        opened.append(self.paths[index].name)
        return before(self, index)

    monkeypatch.setattr(readers.ImageFiles, "__getitem__", count)
    settings = settings_for(tmp_path / "data", "image-classification", **SKIP)
    for looked_at in (20, 20):
        task = load_task(settings)
        assert len(task.train) + len(task.test) == 19 and len(opened) == looked_at
    other = (tmp_path / "data" / "dog" / "1.png").read_bytes()
    (tmp_path / "data" / "dog" / "0.png").write_bytes(other)
    assert len(load_task(settings).train) and len(opened) == 40
    monkeypatch.setattr(data, "_own_code", lambda: "of another release")
    assert len(load_task(settings).train) and len(opened) == 60
    kept = list((tmp_path / "cache" / "rankfit" / "screened").glob("*.json"))
    assert [json.loads(file.read_text()) for file in kept] == [{"3": "input"}] * 3
