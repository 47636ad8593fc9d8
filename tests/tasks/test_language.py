"""Causal language models: tokens, padding and packing, chat templates, evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.configs.settings import ConfigError, RunSettings, from_flat
from rankfit.tasks import load_task
from rankfit.tasks.base_model import ModelError, load_base, target_modules
from rankfit.tasks.data import DataError
from rankfit.tasks.generation import log_likelihoods, write
from rankfit.tasks.lora import count_targets, fisher_scores, inject
from rankfit.tasks.packing import IGNORED
from rankfit.tasks.prompts import as_passage, segments

RECORDS = [
    {"instruction": "Name a fruit.", "input": "", "output": "apple"},
    {"instruction": "Add the numbers.", "input": "1 and 2", "output": "three"},
    {"instruction": "Say yes.", "input": "", "output": "yes, of course, at once and with pleasure"},
    {"instruction": "Name a colour of the sky by day.", "input": "", "output": "blue"},
]
TEXTS = [f"{r['instruction']} {r['input']} {r['output']} ### Response:\n" for r in RECORDS] * 4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    save_model(folder, save_tokenizer(folder, TEXTS), hidden=32)
    return folder


def settings_for(model: Path, data: Path, **changes: object) -> RunSettings:
    flat = {
        "task.kind": "causal-lm",
        "model.source": str(model),
        "data.source": str(data),
        "data.test": "",
        "data.max-length": 300,
    }
    return from_flat(flat | changes)  # type: ignore[operator]


def write_records(folder: Path, records: object = RECORDS, name: str = "train.json") -> Path:
    (folder / name).write_text(json.dumps(records))
    return folder


def task_for(model: Path, folder: Path, **changes: object):
    write_records(folder)
    return load_task(settings_for(model, folder, **changes))


def decode_learnt(task, batch, row: int) -> str:
    labels = batch["labels"][row]
    return task.encoder.tokenizer.decode(labels[labels != IGNORED])


def test_the_loss_is_taken_over_answers_or_over_all(model_folder: Path, tmp_path: Path) -> None:
    task = task_for(model_folder, tmp_path, **{"data.test-fraction": 0.01})
    inputs = task.train.examples.inputs
    batch = task.train.collate(range(len(task.train)))
    for row, record in enumerate(inputs):
        assert decode_learnt(task, batch, row) == record["output"] + "</s>"
    whole = task_for(model_folder, tmp_path, **{"data.test-fraction": 0.01, "task.loss": "all"})
    text = decode_learnt(whole, whole.train.collate([0]), 0)
    assert text.startswith("Below is an instruction") and text.endswith("</s>")
    assert count_targets(batch["labels"]) == int((batch["labels"] != IGNORED).sum())


def test_padding_is_on_the_right_and_is_never_learnt(model_folder: Path, tmp_path: Path) -> None:
    task = task_for(model_folder, tmp_path, **{"data.test-fraction": 0.01})
    batch = task.train.collate([0, 1, 2])
    pad = task.encoder.tokenizer.pad_token_id
    for row in range(3):
        count = int(batch["attention_mask"][row].sum())
        assert (batch["attention_mask"][row, :count] == 1).all()
        assert (batch["input_ids"][row, count:] == pad).all()
        assert (batch["labels"][row, count:] == IGNORED).all()
    example = task.example_batch(3)
    assert list(example) == list(batch)
    assert example["labels"].shape == (3, 300)


def test_a_packed_row_learns_what_its_members_learn_alone(
    model_folder: Path, tmp_path: Path
) -> None:
    """Logits of each example are the same in company as alone, and so is the loss."""
    changes = {"data.test-fraction": 0.01, "data.max-length": 400}
    alone = task_for(model_folder, tmp_path, **changes)
    packed = task_for(model_folder, tmp_path, **changes, **{"task.packing": True})
    base = load_base(alone.settings, alone.labels)
    rows = range(len(alone.train))
    one, many = alone.train.collate(rows), packed.train.collate(rows)
    assert list(many) == list(packed.example_batch(4))
    assert len(many["input_ids"]) < len(one["input_ids"])
    assert count_targets(one["labels"]) == count_targets(many["labels"])
    with torch.no_grad():
        assert base(**many).loss.item() == pytest.approx(base(**one).loss.item(), abs=1e-5)


def test_an_example_that_is_too_long_keeps_its_answer(model_folder: Path, tmp_path: Path) -> None:
    task = task_for(model_folder, tmp_path, **{"data.test-fraction": 0.01, "data.max-length": 24})
    tokenizer = task.encoder.tokenizer
    batch = task.train.collate([0])
    assert batch["input_ids"].shape == (1, 24) and batch["input_ids"][0, 0] == 0  # <s>
    assert decode_learnt(task, batch, 0) == "apple</s>"
    short = task_for(model_folder, tmp_path, **{"data.test-fraction": 0.01, "data.max-length": 4})
    answer = tokenizer("apple", add_special_tokens=False)["input_ids"]
    found = short.train.collate([0])["input_ids"][0].tolist()
    assert found[0] == 0 and found[1:] == ([*answer, tokenizer.eos_token_id])[:3]


def test_prompts_are_the_same_tokens_in_training_and_evaluation(
    model_folder: Path, tmp_path: Path
) -> None:
    for template in ("alpaca", "plain", "chat"):
        task = task_for(model_folder, tmp_path, **{"data.template": template})
        passages = task.passages(task.train, range(len(task.train)))
        for row, passage in enumerate(passages):
            trained = task.train.collate([row])["input_ids"][0].tolist()
            asked = task.encoder.prompt(passage, task.room)
            assert trained[: len(asked)] == asked and len(trained) > len(asked)


def test_chat_templates_are_the_tokenizers_own(model_folder: Path, tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "apple"},
        {"role": "user", "content": "Another."},
        {"role": "assistant", "content": "pear"},
    ]
    write_records(tmp_path, [{"messages": turns}] * 4)
    task = load_task(settings_for(model_folder, tmp_path, **{"data.format": "messages"}))
    tokenizer = task.encoder.tokenizer
    batch = task.train.collate([0])
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert batch["input_ids"][0].tolist() == whole
    assert decode_learnt(task, batch, 0) == "apple<|im_end|>\npear<|im_end|>\n"
    prompt = task.encoder.prompt(task.passages(task.train, [0])[0], 1000)
    assert prompt == tokenizer.apply_chat_template(
        turns[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )


def test_no_chat_template_and_one_that_rewrites_the_past_are_refused(tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    save_model(model, save_tokenizer(model, TEXTS, chat=False), hidden=32)
    task = task_for(model, data, **{"data.template": "chat"})
    with pytest.raises(DataError, match="row 0 the tokenizer has no chat template"):
        _ = task.train
    odd = SimpleNamespace(
        chat_template="x",
        apply_chat_template=lambda turns, tokenize, add_generation_prompt: f"{len(turns)} turns",
    )
    passage = as_passage(RECORDS[0], task.settings)
    with pytest.raises(DataError, match="changes earlier turns"):
        segments(passage, task.settings, odd)


def test_plain_text_is_learnt_whole(model_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path, [{"text": f"line {i} of a text"} for i in range(4)])
    changes = {"data.format": "text", "task.evaluate": "loss"}
    task = load_task(settings_for(model_folder, tmp_path, **changes))
    assert decode_learnt(task, task.train.collate([0]), 0).endswith("of a text</s>")
    base = load_base(task.settings, task.labels)
    found = task.evaluate(base, task.test, range(len(task.test)), torch.device("cpu"), 2)
    with torch.no_grad():
        batch = task.test.collate(range(len(task.test)))
        assert found == {"loss": pytest.approx(base(**batch).loss.item(), abs=1e-5)}


def test_left_padded_batches_write_what_each_prompt_gives_alone(model_folder: Path) -> None:
    settings = settings_for(model_folder, Path("."))
    base = load_base(settings, 2)
    tokenizer = load_task(settings).encoder.tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("Name", "Add the numbers. 1", "Say yes.")]
    device = torch.device("cpu")
    together = write(base, tokenizer, prompts, device, size=3, new_tokens=6)
    alone = write(base, tokenizer, prompts, device, size=1, new_tokens=6)
    assert together == alone and any(alone)


def test_likelihoods_of_a_batch_are_those_of_each_pair(model_folder: Path) -> None:
    settings = settings_for(model_folder, Path("."))
    base = load_base(settings, 2)
    tokenizer = load_task(settings).encoder.tokenizer
    pairs = [
        (tokenizer(before)["input_ids"], tokenizer(after, add_special_tokens=False)["input_ids"])
        for before, after in (("Name a fruit.", "apple"), ("Say", "yes, of course"), ("A", "b"))
    ]
    found = log_likelihoods(base, pairs, torch.device("cpu"), 3, tokenizer.pad_token_id)
    for (before, after), value in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([[*before, *after]])).logits[0]
        steps = logits.log_softmax(-1)[len(before) - 1 : -1]
        expected = sum(float(steps[i, token]) for i, token in enumerate(after))
        assert value == pytest.approx(expected, abs=1e-4)


def test_likelihood_of_own_choices(model_folder: Path, tmp_path: Path) -> None:
    records = [r | {"choices": [r["output"], "no"], "answer": r["output"]} for r in RECORDS]
    write_records(tmp_path, records)
    task = load_task(settings_for(model_folder, tmp_path, **{"task.evaluate": "likelihood"}))
    base = load_base(task.settings, 2)
    rows = range(len(task.train))
    found = task.evaluate(base, task.train, rows, torch.device("cpu"), 4)
    assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1 and found["loss"] > 0
    write_records(tmp_path, RECORDS)
    task = load_task(settings_for(model_folder, tmp_path, **{"task.evaluate": "likelihood"}))
    with pytest.raises(DataError, match="choices"):
        task.evaluate(base, task.train, [0], torch.device("cpu"), 4)


def test_a_tokenizer_without_a_padding_token_still_learns_to_end(tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    save_model(model, save_tokenizer(model, TEXTS, pad=False), hidden=32)
    task = task_for(model, data, **{"data.test-fraction": 0.01})
    batch = task.train.collate([0, 1, 2])
    tokenizer = task.encoder.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(dim=1)
    assert ends.tolist() == [1, 1, 1]  # the end of each answer, and no padding


def test_lengths_beyond_the_model_are_refused_before_training(tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    save_model(model, save_tokenizer(model, TEXTS), hidden=32, positions=64)
    with pytest.raises(ModelError, match="data.max-length 300.*at most 64"):
        _ = task_for(model, data).train
    with pytest.raises(ModelError, match="task.max-new-tokens 64"):
        _ = task_for(model, data, **{"data.max-length": 64, "task.max-new-tokens": 64}).train


def test_another_architecture_learns_and_scores_its_modules(tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    tokenizer = save_tokenizer(model, TEXTS)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 300}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(model)
    task = task_for(model, data)
    base = load_base(task.settings, task.labels)
    targets = target_modules(base, "default")
    peft = inject(base, dict.fromkeys(targets, 2), scale=1.0, dropout=0.0, heads=())
    torch.manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    scores = fisher_scores(peft, task.train, np.arange(2), torch.device("cpu"))
    assert set(scores) == set(targets) and all(score > 0 for score in scores.values())


def test_settings_that_do_not_go_together_are_refused() -> None:
    for flat, message in (
        ({"task.packing": True}, "task.packing"),
        ({"task.problem": "regression"}, "text-classification"),
        ({"task.metrics": "mcc, nonsense"}, "nonsense"),
        ({"task.kind": "causal-lm", "task.metrics": "f1"}, "none for causal-lm"),
        ({"task.kind": "causal-lm", "train.label-prior": 1.0}, "label prior"),
        ({"head.mode": "local"}, "no head to evaluate with"),
        (
            {"task.kind": "causal-lm", "head.mode": "local", "server.evaluate": "none"},
            "head.modules",
        ),
        ({"partition.kind": "natural"}, "partition.column"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_flat(flat)  # type: ignore[arg-type]


def test_targets_by_regular_expression(model_folder: Path) -> None:
    base = load_base(settings_for(model_folder, Path(".")), 2)
    found = target_modules(base, r"re:model\.layers\.1\..*(q|v)_proj")
    assert found == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    assert set(target_modules(base, "re:.*")) == set(target_modules(base, "all-linear"))
    with pytest.raises(ModelError, match="matches no Linear module"):
        target_modules(base, "re:q_proj")  # a whole name must match
    with pytest.raises(ModelError, match="no regular expression"):
        target_modules(base, "re:(")
