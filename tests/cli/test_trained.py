"""``rankfit evaluate``, ``export`` and ``generate`` on runs of every task kind.

What was exported is loaded in a process that has no RankFit, with plain transformers and PEFT.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.cli.main import app
from rankfit.configs.settings import ConfigError
from rankfit.server.run_directory import SavedRun
from tests.server.federation import run, settings_for

SHORT = (
    "run.rounds=2",
    "simulation.clients=2",
    "server.clients-per-round=2",
    "server.min-clients=2",
    "server.diagnostics=false",
    "train.steps=3",
    "fleet.memory-mib=",
    "partition.min-samples=1",
)
SUMS = [(a, b) for a in range(8) for b in range(8)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each kind, and one with personal heads."""
    root = tmp_path_factory.mktemp("trained")
    texts = [f"{a} and {b} is {'much' if a + b > 7 else 'little'}" for a, b in SUMS]
    model = root / "bert"
    tokenizer = save_tokenizer(model, texts)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(
        BertConfig(vocab_size=len(tokenizer), intermediate_size=32, pad_token_id=0, **sizes)
    ).save_pretrained(model)
    data = root / "data"
    data.mkdir()
    rows = [{"text": text, "label": "much" in text} for text in texts]
    (data / "texts.json").write_text(
        json.dumps([{**row, "label": int(row["label"])} for row in rows])
    )
    records = [
        {"instruction": f"Add {a} and {b}.", "input": "", "output": str(a + b)} for a, b in SUMS
    ]
    (data / "sums.json").write_text(json.dumps(records))
    language = root / "llama"
    save_model(language, save_tokenizer(language, [str(r) for r in records]), hidden=32)
    text = ("task.kind=text-classification", f"model.source={model}", f"data.source={data}",
            "data.train=texts.json", "data.test=", "head.mode=frozen")  # fmt: skip
    lm = ("task.kind=causal-lm", f"model.source={language}", f"data.source={data}",
          "data.train=sums.json", "data.test=", "data.max-length=96",
          "task.max-new-tokens=4")  # fmt: skip
    own = ("head.mode=local", "server.evaluate=clients", "partition.test=alike",
           "data.test-samples=60", "data.train-samples=120")  # fmt: skip
    kinds = {"image": (), "text": text, "language": lm, "personal": own}
    return {
        kind: run(settings_for(root / "runs", kind, *SHORT, *parts))
        for kind, parts in kinds.items()
    }


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def final(folder: Path) -> dict[str, float]:
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["evaluation"]


@pytest.mark.parametrize("kind", ["image", "text", "language"])
def test_evaluate_gives_the_figures_of_the_run(
    runs: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    output = tmp_path / "figures.json"
    result = call("evaluate", runs[kind], "--json", output)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert found["round"] == 2
    assert found["figures"]["test"] == pytest.approx(final(runs[kind]))


def test_evaluate_any_checkpoint_and_any_split(runs: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    result = call(
        "evaluate", runs["image"], "--round", 1, "--split", "train", "--json", output,
        "data.train-samples=50",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())["round"] == 1
    result = call("evaluate", runs["text"], "--split", "texts.json", "task.metrics=mcc, f1")
    assert result.exit_code == 0 and "mcc" in result.output
    result = call("evaluate", runs["image"], "--round", 9)
    assert isinstance(result.exception, ConfigError)
    assert "no whole checkpoint of round 9; there are: round-00001, round-00002" in str(
        result.exception
    )
    assert isinstance(call("evaluate", tmp_path).exception, ConfigError)


def test_evaluate_client_by_client(runs: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    result = call("evaluate", runs["personal"], "--clients", "--json", output)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())["figures"]
    assert set(found) == {"partition-0", "partition-1"}
    total = sum(one["examples"] for one in found.values())
    mean = sum(one["accuracy"] * one["examples"] for one in found.values()) / total
    refused = call("evaluate", runs["personal"])
    assert "measure with --clients" in str(refused.exception)
    assert total == 60 and mean == pytest.approx(final(runs["personal"])["accuracy"])


def test_generate_answers_as_it_was_asked_in_training(runs: dict[str, Path]) -> None:
    result = call("generate", runs["language"], "Add 1 and 2.", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    saved = SavedRun.open(runs["language"])
    encoder = saved.task.encoder  # type: ignore[attr-defined]
    row = [r["instruction"] for r in saved.task.train.examples.inputs].index("Add 3 and 2.")
    passage = saved.task.passages(saved.task.train, [row])[0]  # type: ignore[attr-defined]
    assert encoder.question("Add 3 and 2.", saved.task.form, 90) == encoder.prompt(passage, 90)
    refused = call("generate", runs["image"], "Add")
    assert isinstance(refused.exception, ConfigError)
    assert "only a causal-lm writes text" in str(refused.exception)


PLAIN = """
import json, sys

sys.modules["rankfit"] = None  # an import of it fails from here on

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

wanted = json.load(open(sys.argv[1]))
found = {}
for name, job in wanted.items():
    auto = getattr(transformers, job["auto"])
    if job["base"]:
        model = PeftModel.from_pretrained(auto.from_pretrained(job["base"], **job["extra"]),
                                          job["folder"])
    else:
        model = auto.from_pretrained(job["folder"])
    batch = load_file(job["batch"])
    labels = batch.pop("labels")
    with torch.no_grad():
        output = model.eval()(**batch, labels=labels)
    found[name] = {"loss": output.loss.item()}
    if labels.dim() == 1:
        found[name]["accuracy"] = (output.logits.argmax(-1) == labels).double().mean().item()
json.dump(found, open(sys.argv[2], "w"))
"""
AUTO = {
    "image": "AutoModelForImageClassification",
    "text": "AutoModelForSequenceClassification",
    "language": "AutoModelForCausalLM",
}


def test_what_is_exported_needs_no_rankfit(runs: dict[str, Path], tmp_path: Path) -> None:
    """Adapter and merged model of each kind give the run's own figures, to rounding."""
    jobs = {}
    for kind, auto in AUTO.items():
        saved = SavedRun.open(runs[kind])
        batch = tmp_path / f"{kind}.safetensors"
        save_file(saved.task.test.collate(range(len(saved.task.test))), batch)
        for merged in (False, True):
            folder = tmp_path / f"{kind}-{merged}"
            flags = ["--merged"] if merged else []
            result = call("export", runs[kind], "--to", folder, *flags)
            assert result.exit_code == 0, result.output
            base = "" if merged else str(folder / "base")
            extra: dict[str, object] = {}
            if not merged and kind != "image":
                base = saved.settings.model.source
                extra = {"num_labels": 2} if kind == "text" else {}
            jobs[folder.name] = {
                "auto": auto, "base": base, "extra": extra, "folder": str(folder),
                "batch": str(batch),
            }  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "plain.py").write_text(PLAIN)
    subprocess.run(
        [sys.executable, "-I", "plain.py", "jobs.json", "found.json"],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    found = json.loads((tmp_path / "found.json").read_text())
    for name, figures in found.items():
        wanted = final(runs[name.partition("-")[0]])
        assert figures["loss"] == pytest.approx(wanted["loss"], abs=1e-5), name
        if "accuracy" in figures:
            assert figures["accuracy"] == wanted["accuracy"], name


def test_the_card_says_how_it_was_trained(runs: dict[str, Path], tmp_path: Path) -> None:
    call("export", runs["text"], "--to", tmp_path / "text")
    card = (tmp_path / "text" / "README.md").read_text()
    for part in (
        "library_name: peft",
        "round 2 of 2, method rankfit",
        "AutoModelForSequenceClassification.from_pretrained(",
        "id2label={0: '0', 1: '1'}",
        "| clients that took part | 2 |",
        "| accuracy | ",
        'task.kind = "text-classification"',
        "transformers ",
    ):
        assert part in card, part
    again = call("export", runs["text"], "--to", tmp_path / "text")
    assert "is not empty" in str(again.exception)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "text")
    assert tokenizer.pad_token == "<pad>"


def test_a_clients_own_head_goes_along(runs: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    call("export", runs["personal"], "--to", tmp_path / "own", "--client", 1)
    state = load_file(tmp_path / "own" / "adapter_model.safetensors")
    kept = load_file(runs["personal"] / "heads" / "partition-1" / "round-00002.safetensors")
    name = next(name for name in state if name.endswith("classifier.weight"))
    assert torch.equal(state[name], kept["classifier.weight"])
    refused = call("export", runs["image"], "--to", tmp_path / "none", "--client", 0)
    assert "keeps no head" in str(refused.exception)
