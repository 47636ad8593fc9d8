"""Each preset of both papers builds model, data, partition and plan, as from the hub.

Only the sources are changed: tiny models of the same architecture, and data in the files, columns
and splits of the hub's repository.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTImageProcessorPil,
    DeiTModel,
    RobertaConfig,
    RobertaModel,
)

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.client.app import app as client_app
from rankfit.configs.compose import compose, preset_names
from rankfit.configs.settings import to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import build, who_holds_what
from rankfit.strategies.methods import find
from tests.conftest import ROOT
from tests.tasks.test_commonsense import RECORDS, record

WORDS = [
    "the",
    "party",
    "shall",
    "pay",
    "a",
    "fee",
    "to",
    "this",
    "agreement",
    "and",
    "no",
    "other",
    "law",
    "may",
    "hold",
]


def _cifar100(root: Path) -> None:
    config = DeiTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=48, image_size=32, patch_size=16)  # fmt: skip
    DeiTModel(config).save_pretrained(root / "model")
    size = {"height": 32, "width": 32}
    DeiTImageProcessorPil(size=size, crop_size=size).save_pretrained(root / "model")
    blob = io.BytesIO()
    Pictures.new("RGB", (32, 32), "green").save(blob, "PNG")
    features = Features(
        {
            "img": Image(),
            "fine_label": ClassLabel(names=[f"fine {i}" for i in range(100)]),
            "coarse_label": ClassLabel(names=[f"coarse {i}" for i in range(20)]),
        }
    )
    for split, each in (("train", 40), ("test", 1)):
        labels = [i % 100 for i in range(100 * each)]
        rows = {
            "img": [{"bytes": blob.getvalue(), "path": None}] * len(labels),
            "fine_label": labels,
            "coarse_label": [label // 5 for label in labels],
        }
        _parquet(root / "data" / "cifar100", split, rows, features)


def _ledgar(root: Path) -> None:
    tokenizer = save_tokenizer(root / "model", WORDS)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=48, pad_token_id=4)  # fmt: skip
    BertModel(config).save_pretrained(root / "model")
    names = [f"provision {i}" for i in range(100)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    for split, each in (("train", 40), ("validation", 1), ("test", 1)):
        labels = [i % 100 for i in range(100 * each)]
        rows = {"text": [" ".join(WORDS[i % 7 :]) for i in labels], "label": labels}
        _parquet(root / "data" / "ledgar", split, rows, features)


def _sst2(root: Path) -> None:
    tokenizer = save_tokenizer(root / "model", WORDS)
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2,
                           num_attention_heads=2, intermediate_size=64, pad_token_id=1,
                           max_position_embeddings=140)  # fmt: skip
    RobertaModel(config).save_pretrained(root / "model")
    names = ["negative", "positive"]
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=names), "idx": Value("int32")}
    )
    for split, count in (("train", 4000), ("validation", 20), ("test", 20)):
        labels = [-1 if split == "test" else i % 2 for i in range(count)]
        rows = {"sentence": [" ".join(WORDS)] * count, "label": labels, "idx": [*range(count)]}
        _parquet(root / "data" / "sst2", split, rows, features)


def _commonsense(root: Path) -> None:
    records = [record(task) for task in RECORDS] * 100
    save_model(root / "model", save_tokenizer(root / "model", [r["instruction"] for r in records]),
               hidden=128, heads=2)  # fmt: skip
    folder = root / "data" / "ft-training_set"
    folder.mkdir(parents=True)
    (folder / "commonsense_170k.json").write_text(json.dumps(records))
    for task in RECORDS:
        (root / "data" / "dataset" / task).mkdir(parents=True)
        (root / "data" / "dataset" / task / "test.json").write_text(json.dumps([record(task)] * 2))


def _parquet(
    folder: Path, split: str, rows: Mapping[str, list[object]], features: Features
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict(dict(rows), features=features)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


STAND_INS: dict[str, tuple[Callable[[Path], None], int, int]] = {
    # Preset: what makes its stand-in, and clients and outputs that it must have.
    "cifar100-deit": (_cifar100, 20, 100),
    "ledgar-bert": (_ledgar, 20, 100),
    "glue-roberta": (_sst2, 20, 2),
    "commonsense-llama": (_commonsense, 50, 0),
}


def _commands() -> list[str]:
    """The papers' experiments that the guide lists."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    found = re.findall(r"^rankfit run (.+)$", text, re.MULTILINE)
    return [command for command in found if command.split()[0] in STAND_INS]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a preset's stand-in, made when it is first asked for."""

    @cache
    def folder(preset: str) -> Path:
        root = tmp_path_factory.mktemp(preset)
        STAND_INS[preset][0](root)
        return root

    return folder


@pytest.mark.parametrize("command", _commands())
def test_every_command_of_the_papers_builds_model_data_partition_and_plan(
    command: str, stand_ins: Callable[[str], Path], tmp_path: Path
) -> None:
    preset = command.split()[0]
    root, (_, _, classes) = stand_ins(preset), STAND_INS[preset]
    sources = (f"model.source={root / 'model'}", f"data.source={root / 'data'}")
    # The halves of the stand-in's width bound the rank of Kronecker factors.
    small = ("lora.rank=8",) if " lokr " in command else ()
    settings = compose([*command.split(), *small, *sources, f"run.directory={tmp_path}"])
    clients = 100 if "clients-100" in command else STAND_INS[preset][1]
    assert settings.simulation.clients == clients
    nodes = [{"partition-id": i, "num-partitions": clients} for i in range(clients)]
    grid = InProcessGrid(client_app, to_flat(settings), nodes)
    federation = build(settings)
    federation.strategy.prepare(grid, 1)
    holdings = who_holds_what(federation)
    assert holdings is not None
    held = holdings.counts()
    assert len(held) == clients and held.sum() == len(holdings.labels)
    if settings.partition.kind == "pathological":
        assert ((held > 0).sum(axis=1) == settings.partition.classes_per_client).all()
    plans = federation.strategy.plans
    assert len(plans) == clients
    assert all(0 < plan.rank <= settings.lora.rank for plan in plans.values())
    tensors = federation.start.head.items()
    head = [t for name, t in tensors if name.endswith("weight") and ".outer." not in name]
    frozen = settings.head.mode == "frozen" or classes == 0
    assert not head if frozen else head[-1].shape[0] == classes
    if classes:
        assert np.prod(held.shape) == clients * classes


def test_the_guide_lists_every_method_ablation_and_split_of_the_papers() -> None:
    commands = " ".join(_commands())
    for name in ("lokr", "legend", "straggler", "fed-hello-rgd", "ffa-lora", "flexlora", "hetlora"):
        assert f"method.name={name}" in commands or f" {name} " in commands
    for part in find("hralora").parts:
        assert f"method.without={part}" in commands
    for splits in ("classes-20", "partition.kind=iid", "clients-100 classes-20", "ledgar-bert"):
        assert splits in commands


def test_the_guide_gives_the_command_of_every_preset() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    included = {"fslora", "hralora"}  # what all presets of a paper share
    for name in set(preset_names()) - included:
        assert re.search(rf"\b{name}\b", text), name
    for line in re.findall(r"^rankfit run (.*?)(?: +#.*)?$", text, re.MULTILINE):
        compose(line.split())
