"""The table of docs/tasks.md: each form of files, for each kind of record, to a trained round."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset
from PIL import Image
from transformers import BertConfig, BertModel

from benchmarks.tiny_lm import save_model, save_tokenizer
from tests.conftest import ROOT
from tests.server.federation import run, settings_for
from tests.server.test_loop import lines

COUNT = 24
WORDS = ["red", "green", "round", "square", "apple", "leaf"]
TEXTS = [f"{WORDS[i % 6]} {WORDS[(i * 5 + 1) % 6]}" for i in range(COUNT)]
TURNS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "a leaf"}]
         for text in TEXTS]  # fmt: skip

#: Kind of record: its columns, and the settings that it needs.
KINDS: dict[str, tuple[dict[str, list[Any]], tuple[str, ...]]] = {
    "picture": ({"image": ["*"] * COUNT, "label": ["x", "y"] * (COUNT // 2)}, ()),
    "text": (
        {"text": TEXTS, "label": [i % 3 for i in range(COUNT)]},
        ("task.kind=text-classification",),
    ),
    "pair": (
        {"a": TEXTS, "b": TEXTS[::-1], "label": ["no", "yes"] * (COUNT // 2)},
        ("task.kind=text-classification", "data.input-column=a,b"),
    ),
    "number": (
        {"text": TEXTS, "label": [i / 8 for i in range(COUNT)]},
        ("task.kind=text-classification", "task.problem=regression"),
    ),
    "instruction": ({"instruction": TEXTS, "output": TEXTS[::-1]}, ("task.kind=causal-lm",)),
    "conversation": ({"messages": TURNS}, ("task.kind=causal-lm",)),
    "prompt": ({"prompt": TEXTS, "completion": TEXTS[::-1]}, ("task.kind=causal-lm",)),
    "plain text": ({"text": TEXTS}, ("task.kind=causal-lm",)),
}


def _cells(rows: dict[str, list[Any]]) -> pandas.DataFrame:
    """A table whose lists are written as JSON, as a file of text has them."""
    table = pandas.DataFrame(rows)
    return table.map(lambda cell: json.dumps(cell) if isinstance(cell, list) else cell)


def _json_lines(rows: dict[str, list[Any]]) -> str:
    return "\n".join(map(json.dumps, pandas.DataFrame(rows).to_dict("records")))


def _shards(folder: Path, rows: dict[str, list[Any]]) -> None:
    (folder / "data").mkdir()
    for part in range(2):
        own = {name: cells[part::2] for name, cells in rows.items()}
        Dataset.from_dict(own).to_parquet(folder / "data" / f"train-0000{part}-of-00002.parquet")


#: Form of files: what writes it.
FORMS: dict[str, Callable[[Path, dict[str, list[Any]]], Any]] = {
    "CSV": lambda folder, rows: _cells(rows).to_csv(folder / "train.csv", index=False),
    "TSV": lambda folder, rows: _cells(rows).to_csv(folder / "train.tsv", sep="\t", index=False),
    "JSON": lambda folder, rows: (folder / "train.json").write_text(
        json.dumps(pandas.DataFrame(rows).to_dict("records"))
    ),
    "JSON lines": lambda folder, rows: (folder / "train.jsonl").write_text(_json_lines(rows)),
    "compressed": lambda folder, rows: _cells(rows).to_csv(folder / "train.csv.gz", index=False),
    "parquet": lambda folder, rows: Dataset.from_dict(rows).to_parquet(folder / "train.parquet"),
    "shards": _shards,
    "`save_to_disk`": lambda folder, rows: Dataset.from_dict(rows).save_to_disk(folder),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    bert, llama = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("llama")
    tokenizer = save_tokenizer(bert, TEXTS, 300)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=16,
                        pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    BertModel(config).save_pretrained(bert)
    save_model(llama, save_tokenizer(llama, TEXTS, 300), hidden=16, layers=1, heads=2)
    return {"text-classification": str(bert), "causal-lm": str(llama)}


def train(folder: Path, models: dict[str, str], *settings: str) -> None:
    """Train one round on what lies in a folder; every record is somebody's."""
    kind = next((part[10:] for part in settings if part.startswith("task.kind=")), "")
    model = (f"model.source={models[kind]}", "data.max-length=64") if kind else ()
    own = settings_for(
        folder.parent / "runs", folder.name, f"data.source={folder}", "run.rounds=1",
        "server.evaluate=none", "server.diagnostics=false", "train.steps=1", "train.batch-size=4",
        "simulation.clients=2", "server.clients-per-round=2", "server.min-clients=2",
        "data.test=", "data.test-fraction=0.25", "partition.min-samples=1", "fleet.memory-mib=",
        "fleet.upload-mbps=", "fleet.download-mbps=", "lora.rank=2", *model, *settings,
    )  # fmt: skip
    (line,) = lines(run(own))[1:]
    assert [client["merged"] for client in line["clients"].values()] == [True, True]
    assert sum(client["num-examples"] for client in line["clients"].values()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_each_cell_of_the_table(
    tmp_path: Path, models: dict[str, str], form: str, kind: str
) -> None:
    rows, settings = KINDS[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "picture":
        paths = [str(tmp_path / f"{row}.png") for row in range(COUNT)]
        for row, path in enumerate(paths):
            Image.new("RGB", (8, 8), (10 * row, 0, 0)).save(path)
        rows = rows | {"image": paths}
    FORMS[form](folder, rows)
    train(folder, models, *settings)


def test_folders_of_pictures_and_lines_of_text(tmp_path: Path, models: dict[str, str]) -> None:
    for row in range(COUNT):
        place = tmp_path / "pictures" / "ab"[row % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * row, 0, 0)).save(place / f"{row}.png")
    train(tmp_path / "pictures", models)
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("\n".join(TEXTS))
    train(tmp_path / "lines", models, "task.kind=causal-lm")


def test_the_table_is_this_one() -> None:
    """docs/tasks.md names every form and every kind that is run here, and no other."""
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    table = re.search(r"\| files \|.*?\n\n", text, re.DOTALL)
    assert table is not None
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.group().strip().splitlines()
    ]
    assert head[1:] == list(KINDS)
    assert [row[0] for row in rows if all(cell == "yes" for cell in row[1:])] == list(FORMS)
    assert {row[0]: row.index("yes") for row in rows[len(FORMS) :]} == {
        "folders of pictures": 1, "lines of text (`.txt`)": 8,
    }  # fmt: skip
