"""Broken input: one line and exit status 2, before Flower starts."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as hf

from rankfit.cli.preflight import check_run
from rankfit.configs.compose import compose
from tests.tasks.test_conventions import PAD, SIZES, UNK, save_tokenizer

#: Seconds of CPU that a mistake may cost.
SECONDS = 10.0
#: On cores that others use a second of CPU does less: then so many times what the libraries cost.
IMPORTS = 2.0


def cpu_seconds() -> float:
    """CPU of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def imports() -> float:
    """Seconds of CPU that importing the libraries costs here and now."""
    before = cpu_seconds()
    libraries = "import torch, transformers, peft, datasets; transformers.AutoModelForCausalLM"
    subprocess.run([sys.executable, "-c", libraries], check=True, capture_output=True)
    return cpu_seconds() - before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text classifier, a language model, and data for both."""
    folder = tmp_path_factory.mktemp("broken")
    tokenizer = save_tokenizer(folder / "bert", PAD | UNK)
    sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": 0}
    hf.BertForSequenceClassification(
        hf.BertConfig(id2label={0: "no", 1: "yes"}, max_position_embeddings=64, **sizes)
    ).save_pretrained(folder / "bert")
    larger = save_tokenizer(folder / "larger", PAD | UNK, more=2)
    hf.BertForSequenceClassification(hf.BertConfig(**sizes)).save_pretrained(folder / "larger")
    assert len(larger) > len(tokenizer)
    save_tokenizer(folder / "opt", PAD | UNK | {"eos_token": "</s>"})
    opt = hf.OPTConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    hf.OPTForCausalLM(opt).save_pretrained(folder / "opt")
    rows = [{"text": f"{w} film", "label": n} for w, n in (("good", "yes"), ("bad", "no"))] * 30
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "others.json").write_text(
        json.dumps([r | {"label": "so" + r["label"]} for r in rows])
    )
    asked = [{"instruction": "is it good", "output": "very"}] * 20
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "cut.json").write_text(json.dumps(rows)[:-40])
    return folder


TEXT = (
    "quickstart", "task.kind=text-classification", "model.source=./bert", "data.source=./data.json",
    "data.test=", "data.max-length=16", "lora.rank=4", "fleet.memory-mib=",
    "simulation.clients=4", "partition.min-samples=1", "partition.kind=iid",
)  # fmt: skip
LANGUAGE = (
    "quickstart", "task.kind=causal-lm", "model.source=./opt", "data.source=./asked.json",
    "data.test=", "data.max-length=32", "task.max-new-tokens=8", "lora.rank=4", "fleet.memory-mib=",
    "data.template=plain", "partition.kind=iid", "partition.min-samples=0",
)  # fmt: skip
#: What is wrong → the run, and what the line must say.
BROKEN = {
    "a setting": ((*TEXT, "train.lr=1"), "train.learning-rate"),
    "a method": ((*TEXT, "method.name=fedavg"), "unknown method 'fedavg'"),
    "no data": ((*TEXT, "data.source=./nowhere.json"), "nowhere.json"),
    "no model": ((*TEXT, "model.source=./nothing"), "there is no such folder"),
    "cut data": ((*TEXT, "data.source=./cut.json"), "cut.json"),
    "no such column": ((*TEXT, "data.input-column=words"), "words"),
    "other labels": (
        (*TEXT, "data.source=./others.json", "head.mode=frozen"),
        "is for no, yes, the data has sono, soyes",
    ),
    "tokens without embedding": ((*TEXT, "model.source=./larger"), "resize_token_embeddings"),
    "texts too long": ((*TEXT, "data.max-length=65"), "data.max-length=64"),
    "targets": ((*TEXT, "lora.targets=q_proj"), "matches no Linear module"),
    "a rank": ((*TEXT, "lora.rank=64"), "lora.rank 64 is above the rank"),
    "too few samples": ((*TEXT, "simulation.clients=50", "partition.min-samples=10"), "samples"),
    "no client for a round": ((*TEXT, "server.min-clients=99"), "server.min-clients 99"),
    "devices too small": ((*TEXT, "fleet.memory-mib=0.01"), "no device of fleet.memory-mib"),
    "packing": ((*LANGUAGE, "task.packing=true"), "task.packing: opt"),
    "no chat template": ((*LANGUAGE, "data.template=chat"), "chat template"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_input_is_one_line_and_exit_status_2(
    what: str, place: Path, tmp_path: Path, imports: float
) -> None:
    arguments, message = BROKEN[what]
    before = cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "rankfit.cli.main", "run", *arguments, f"run.directory={tmp_path}"],
        capture_output=True, text=True, timeout=300, check=False, cwd=place,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    spent = cpu_seconds() - before
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())
    allowed = max(SECONDS, IMPORTS * imports)
    assert spent < allowed, f"{spent:.1f} s of CPU; {allowed:.1f} allowed"


def test_what_is_right_passes_and_is_told_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert any("names the data's classes" in note for note in check_run(compose(TEXT)))
    check_run(compose(LANGUAGE))
    check_run(compose(["quickstart"]))
