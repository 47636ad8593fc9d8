"""What a model and its tokenizer say of classes, padding and lengths, beside what a run says."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

from benchmarks.tiny_lm import CHAT
from rankfit.configs.settings import Model, RunSettings, from_flat
from rankfit.server.export import export
from rankfit.server.run_directory import SavedRun
from rankfit.tasks import load_task
from rankfit.tasks.base_model import ModelError, load_base
from rankfit.tasks.config import longest_text, own_classes, places, read_config
from rankfit.tasks.targets import head_modules
from tests.server.federation import run, settings_for

WORDS = ("good", "bad", "film", "very", "a", "is", "the", "not", "so", "it", "user", "assistant")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def save_tokenizer(
    folder: Path,
    special: Mapping[str, str],
    around: str = "$A",
    chat: str | None = None,
    more: int = 0,
) -> PreTrainedTokenizerFast:
    """A tokenizer of words; ``special`` by kind, ``around`` what a text is put between."""
    tokens = [*dict.fromkeys(special.values())]
    names = [*tokens, *("[im_start]", "[im_end]")[: 2 * bool(chat)], *WORDS]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if around != "$A":
        used = [(token, vocabulary[token]) for token in tokens if token in around.split()]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **special)
    fast.add_tokens([f"[more{number}]" for number in range(more)])
    fast.save_pretrained(folder)
    return fast


BOS, EOS, PAD, UNK = (
    {"bos_token": "<s>"},
    {"eos_token": "</s>"},
    {"pad_token": "<pad>"},
    {"unk_token": "<unk>"},
)
CLS = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
#: Name → special tokens, what stands around a text, chat template.
TOKENIZERS: dict[str, tuple[dict[str, str], str, str | None]] = {
    "llama": (UNK | BOS | EOS, "<s> $A", None),
    "llama with padding": (PAD | UNK | BOS | EOS, "<s> $A", None),
    "gpt2": ({"bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<|end|>"}, "$A", None),
    "bert": (PAD | UNK | CLS, "[CLS] $A [SEP]", None),
    "roberta": (BOS | PAD | EOS | UNK, "<s> $A </s>", None),
    "t5": (PAD | EOS | UNK, "$A </s>", None),
    "padding alone": (UNK | PAD, "$A", None),
    "unknown pads": ({"unk_token": "<unk>", "pad_token": "<unk>"} | EOS, "$A", None),
    "end alone": (UNK | EOS, "$A", None),
    "chat": (PAD | UNK | BOS | EOS, "<s> $A", CHAT),
    "chat without padding": (UNK | {"eos_token": "[im_end]"}, "$A", CHAT),
    "nothing": (UNK, "$A", None),
}
CONFIGS = {
    "text-classification": hf.LlamaForSequenceClassification,
    "causal-lm": hf.LlamaForCausalLM,
}


def settings_of(folder: Path, kind: str, **changes: object) -> RunSettings:
    flat = {
        "task.kind": kind,
        "model.source": str(folder),
        "data.source": str(folder / "data.json"),
        "data.test": "",
        "data.max-length": 60,
    }
    return from_flat(flat | changes)  # type: ignore[operator]


def save_data(folder: Path, kind: str) -> None:
    texts = ["good film", "bad", "a very very good film", "the film is not so good", "bad film"] * 4
    rows: list[dict[str, Any]] = [
        {"text": text, "label": "no" if "bad" in text or "not" in text else "yes"} for text in texts
    ]
    if kind == "causal-lm":
        rows = [{"instruction": row["text"], "output": "it is good"} for row in rows]
    (folder / "data.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("told", [None, 0, 5], ids=["silent", "zero", "other"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_means_the_same_alone_and_in_a_padded_batch(
    name: str, told: int | None, kind: str, tmp_path: Path
) -> None:
    """Whatever tokenizer and config say of padding, both use one token, and it changes nothing."""
    special, around, chat = TOKENIZERS[name]
    tokenizer = save_tokenizer(tmp_path, special, around, chat)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=told, num_key_value_heads=1, num_labels=2,
        bos_token_id=None, eos_token_id=None, **SIZES,
    )  # fmt: skip
    CONFIGS[kind](config).save_pretrained(tmp_path)
    save_data(tmp_path, kind)
    changes = {"data.template": "chat" if chat and kind == "causal-lm" else "plain"}
    task = load_task(settings_of(tmp_path, kind, **changes))
    if name == "nothing":  # a word, or the unknown one, may end a text: it cannot pad
        with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
            _ = task.train.collate([0])
        return
    base = load_base(task.settings, task.labels, task.output_names)
    rows = [0, 1, 2, 3]
    together = dict(task.train.collate(rows))
    assert int(together["input_ids"].max()) < len(tokenizer)
    together.pop("labels")
    with torch.no_grad():
        joint = base(**together).logits
        for row in rows:
            alone = dict(task.train.collate([row]))
            alone.pop("labels")
            own = base(**alone).logits[0]
            length = len(alone["input_ids"][0]) if kind == "causal-lm" else None
            torch.testing.assert_close(joint[row][:length], own, atol=1e-5, rtol=1e-4)


def test_positions_that_count_from_padding_keep_the_models_padding(tmp_path: Path) -> None:
    """RoBERTa was trained from position pad + 1: the tokenizer follows, not the model."""
    tokenizer = save_tokenizer(tmp_path, BOS | PAD | EOS | UNK, "<s> $A </s>")
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(tmp_path)
    config = hf.RobertaConfig(
        vocab_size=len(tokenizer), pad_token_id=1, max_position_embeddings=62, **SIZES
    )
    hf.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    save_data(tmp_path, "text-classification")
    task = load_task(settings_of(tmp_path, "text-classification"))
    base = load_base(task.settings, task.labels, task.output_names)
    assert base.config.pad_token_id == 1
    assert (task.train.collate([0, 2])["input_ids"][0, -1]) == 1
    too_long = load_task(settings_of(tmp_path, "text-classification", **{"data.max-length": 61}))
    with pytest.raises(ModelError, match="at most 60 tokens"):
        _ = too_long.train


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, PAD | UNK | EOS, more=3)
    config = hf.BertConfig(vocab_size=len(tokenizer) - 3, pad_token_id=0, **SIZES)
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path)
    save_data(tmp_path, "text-classification")
    task = load_task(settings_of(tmp_path, "text-classification"))
    with pytest.raises(
        ModelError, match=r"the token '\[more2\]' with id 17.*for 15 tokens"
    ) as found:
        _ = task.train
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (hf.GPT2Config(n_positions=40), 40),
        (hf.CodeGenConfig(n_positions=50, n_ctx=40), 40),
        (hf.LlamaConfig(max_position_embeddings=40), 40),
        (hf.OPTConfig(max_position_embeddings=40), 40),
        (hf.MptConfig(max_seq_len=40), 40),
        (hf.WhisperConfig(max_target_positions=40), 40),
        (hf.RobertaConfig(max_position_embeddings=42, pad_token_id=1), 40),
        (hf.LongformerConfig(max_position_embeddings=42, pad_token_id=1), 40),
        (hf.XLMRobertaConfig(max_position_embeddings=42, pad_token_id=1), 40),
        (hf.T5Config(n_positions=40), None),  # of old files; T5's positions have no end
        (hf.BloomConfig(), None),
        (hf.MambaConfig(), None),
    ],
    ids=lambda value: value.model_type if isinstance(value, hf.PreTrainedConfig) else "",
)
def test_the_longest_text_of_each_architecture(
    config: hf.PreTrainedConfig, longest: int | None
) -> None:
    assert longest_text(config) == longest


@pytest.mark.parametrize(
    "model_class",
    [hf.GPT2LMHeadModel, hf.OPTForCausalLM, hf.RobertaForMaskedLM, hf.XLMRobertaForMaskedLM],
)
def test_the_longest_text_is_the_last_that_the_model_can_read(model_class: Any) -> None:
    sizes = {"max_position_embeddings": 20, "vocab_size": 30, "num_hidden_layers": 1}
    model = model_class(model_class.config_class(**sizes)).eval()
    longest = longest_text(model.config)
    assert longest is not None
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_classes_are_matched_by_name() -> None:
    own = ("NEGATIVE", "very_positive", "neutral")
    assert places(("neutral", "NEGATIVE"), own) == [2, 0]
    assert places(("Very Positive", "negative", "neutral"), own) == [1, 0, 2]
    assert places(("0", "1", "2"), own) == [0, 1, 2]  # numbers are ids
    assert places(("0", "1"), own) is None
    assert places(("negative", "positive"), own) is None
    assert places(("a", "A"), ("a", "A")) == [0, 1]
    assert own_classes(hf.BertConfig(num_labels=3)) == ()
    assert own_classes(hf.BertConfig(id2label={0: "b", 1: "a"})) == ("b", "a")


def test_classes_that_a_file_names_by_label2id_alone_are_read(tmp_path: Path) -> None:
    written = {"model_type": "bert", "label2id": {"b": 0, "a": 1}}
    for file in (tmp_path / "config.json", tmp_path / "other.json"):
        file.write_text(json.dumps(written))
    for source in (str(tmp_path), f"config:{tmp_path / 'other.json'}"):
        assert own_classes(read_config(Model(source=source))) == ("b", "a")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that knows good from bad, with ids against the alphabet; and data for it."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = save_tokenizer(folder, PAD | UNK | CLS, "[CLS] $A [SEP]")
    config = hf.BertConfig(
        vocab_size=len(tokenizer), pad_token_id=0, id2label={0: "POSITIVE", 1: "NEGATIVE"},
        label2id={"POSITIVE": 0, "NEGATIVE": 1}, hidden_dropout_prob=0.0, **SIZES,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config)
    texts = [
        f"{a} {judged} {b}" for a in WORDS[2:] for b in WORDS[2:] for judged in ("good", "bad")
    ]
    labels = torch.tensor([int("bad" in text) for text in texts])
    inputs = tokenizer(texts, return_tensors="pt", return_token_type_ids=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    rows = [
        {"text": text, "label": ("Positive", "Negative")[label]}
        for text, label in zip(texts, labels.tolist(), strict=True)
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def parts(folder: Path, *more: str) -> tuple[str, ...]:
    return (
        "task.kind=text-classification", f"model.source={folder}",
        f"data.source={folder / 'data.json'}", "data.test=", "run.rounds=1",
        "data.max-length=16", "fleet.memory-mib=", "lora.rank=2", "train.steps=1",
        "train.learning-rate=1e-5", *more,
    )  # fmt: skip


JUDGED = {"the good film": "POSITIVE", "the bad film": "NEGATIVE"}


def test_a_models_classes_are_kept_from_a_frozen_head_to_a_pipeline(
    judge: Path, tmp_path: Path
) -> None:
    """Accuracy from the first round on, the merged model, and the adapter as its card loads it."""
    folder = run(settings_for(tmp_path, "judged", *parts(judge, "head.mode=frozen")))
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["evaluation"]["accuracy"] for line in lines] == [1.0, 1.0]
    saved = SavedRun.open(folder)
    merged = export(saved, tmp_path / "merged", merged=True)
    assert json.loads((merged / "config.json").read_text())["id2label"] == {
        "0": "POSITIVE",
        "1": "NEGATIVE",
    }
    judging = pipeline("text-classification", str(merged))
    assert {text: judging(text)[0]["label"] for text in JUDGED} == JUDGED

    adapter = export(SavedRun.open(folder), tmp_path / "adapter", merged=False)
    card = (adapter / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("FOLDER", str(adapter)).replace(f"./{judge.name}", str(judge))
    loaded: dict[str, Any] = {}
    exec(code, loaded)  # noqa: S102 - what the card tells its reader to do
    model = loaded["model"].merge_and_unload()
    assert model.config.id2label == {0: "POSITIVE", 1: "NEGATIVE"}
    tokenizer = hf.AutoTokenizer.from_pretrained(adapter)
    judging = pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert {text: judging(text)[0]["label"] for text in JUDGED} == JUDGED
    for file in (*adapter.rglob("*"), *merged.rglob("*"), folder / "report.html"):
        if file.suffix in (".md", ".json", ".html"):
            assert str(judge) not in file.read_text() and str(tmp_path) not in file.read_text()


def test_other_classes_get_a_new_head_or_a_refusal(
    judge: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = load_task(
        settings_of(judge, "text-classification", **{"data.class-names": "Negative,Positive,odd"})
    )
    with caplog.at_level(logging.INFO):
        base = load_base(task.settings, task.labels, task.output_names)
    assert base.config.id2label == {0: "Negative", 1: "Positive", 2: "odd"}
    assert "the head is a new one" in caplog.text
    rows = json.loads((judge / "data.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps([row | {"label": row["label"].replace("ive", "")} for row in rows]))
    of_others = {"data.source": str(other)}
    task = load_task(settings_of(judge, "text-classification", **of_others))
    base = load_base(task.settings, task.labels, task.output_names)
    own = hf.BertForSequenceClassification.from_pretrained(judge)
    assert base.config.id2label == {0: "Negat", 1: "Posit"}
    assert not torch.equal(base.classifier.weight, own.classifier.weight)
    frozen = settings_of(judge, "text-classification", **of_others, **{"head.mode": "frozen"})
    with pytest.raises(ModelError, match="is for POSITIVE, NEGATIVE, the data has Negat, Posit"):
        _ = load_task(frozen).labels


def test_a_masked_language_model_gets_a_new_classifier_and_pooler(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are trained, and both come along in an export."""
    model = tmp_path / "model"
    tokenizer = save_tokenizer(model, PAD | UNK | CLS, "[CLS] $A [SEP]")
    config = hf.BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **SIZES)
    hf.BertForMaskedLM(config).save_pretrained(model)
    save_data(model, "text-classification")
    settings = settings_for(
        tmp_path, "masked", *parts(model, "partition.min-samples=1", "train.learning-rate=0.01")
    )
    with caplog.at_level(logging.INFO):
        folder = run(settings)
    assert "BertForMaskedLM) has no fitting bert.pooler and classifier" in caplog.text
    saved = SavedRun.open(folder)
    assert head_modules(saved.base) == ("bert.pooler", "classifier")
    own = saved.base.get_submodule("bert.pooler.dense").weight
    assert not torch.equal(saved.adapter.head["bert.pooler.dense.weight"], own)
    measured = saved.evaluator()(saved.adapter)
    merged = export(SavedRun.open(folder), tmp_path / "merged", merged=True)
    whole = hf.AutoModelForSequenceClassification.from_pretrained(merged)
    assert "new_modules" not in whole.config.to_dict()
    task = load_task(settings)
    rows = range(len(task.test))
    assert task.evaluate(whole, task.test, rows, torch.device("cpu"), 8) == pytest.approx(measured)
