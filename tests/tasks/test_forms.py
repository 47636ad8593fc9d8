"""Language data as people have it: each form recognised, its turns as the template writes them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.configs.settings import RunSettings, from_flat
from rankfit.tasks import load_task
from rankfit.tasks.data import DataError
from rankfit.tasks.language_model import LanguageTask
from rankfit.tasks.lora import IGNORED
from rankfit.tasks.prompts import as_passage, find_reading
from rankfit.tasks.records import RecordError

WORDS = ["user assistant system tool Name a fruit. apple pear Be brief. weather in Rome sunny"] * 4
#: A template that tells of tools and of calls.
TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t['name'] }};{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['tool_calls'] %}"
    "[call {{ m['tool_calls'][0]['function']['name'] }}]{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: One that refuses system turns, as Gemma's and Mistral's do.
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, template in (("tools", TOOLS), ("strict", STRICT)):
        folder = tmp_path_factory.mktemp(name)
        tokenizer = save_tokenizer(folder, WORDS)
        save_model(folder, tokenizer, hidden=32)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        made[name] = folder
    return made


def settings_for(folder: Path, model: Path, **changes: object) -> RunSettings:
    flat = {
        "task.kind": "causal-lm",
        "data.source": str(folder),
        "data.test": "",
        "data.test-fraction": 0.01,
        "data.max-length": 200,
        "model.source": str(model),
    }
    return from_flat(flat | changes)  # type: ignore[operator]


def load(folder: Path, model: Path, records: list[Any], **changes: object) -> LanguageTask:
    (folder / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    task = load_task(settings_for(folder, model, **changes))
    assert isinstance(task, LanguageTask)
    return task


def texts(task: LanguageTask, row: int = 0) -> tuple[str, str]:
    """The whole of an example, and what is learned of it."""
    batch = task.train.collate([row])
    labels = batch["labels"][0]
    decode = task.encoder.tokenizer.decode
    return decode(batch["input_ids"][0]), decode(labels[labels != IGNORED])


CHAT = "<user>Name a fruit.</s><assistant>apple</s>"
TURNS = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "apple"}]
SHARED = [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "apple"}]
ALPACA = "### Instruction:\nName a fruit.\n\n### Response:\napple</s>"


@pytest.mark.parametrize(
    ("record", "form", "whole"),
    [
        ({"messages": TURNS}, "messages", CHAT),
        ({"messages": json.dumps(TURNS)}, "messages", CHAT),
        ({"conversations": SHARED}, "sharegpt", CHAT),
        ({"conversation": TURNS, "id": 3}, "sharegpt", CHAT),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt-completion", CHAT),
        ({"prompt": "Name a fruit.", "completion": " apple"}, "prompt-completion",
         "<s>Name a fruit. apple</s>"),
        ({"instruction": "Name a fruit.", "input": "", "output": "apple"}, "instruction", ALPACA),
        ({"question": "Name a fruit.", "answer": "apple"}, "instruction", ALPACA),
        ({"instruction": "Name a fruit.", "context": None, "response": "apple", "category": "x"},
         "instruction", ALPACA),
        ({"Prompt": "Name a fruit.", "Response": "apple"}, "instruction", ALPACA),
        ({"input": "Name a fruit.", "output": "apple"}, "instruction", ALPACA),
        ({"text": "Name a fruit.", "label": -1}, "text", "<s>Name a fruit.</s>"),
        ({"content": "Name a fruit."}, "text", "<s>Name a fruit.</s>"),
    ],
)  # fmt: skip
def test_forms_are_recognised_and_named(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    record: dict[str, Any], form: str, whole: str,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO):
        task = load(tmp_path, models["tools"], [record] * 4)
        found = texts(task)[0]
    assert found.endswith(whole) and task.form == form
    assert f"read as {form} (" in caplog.text


def test_columns_of_any_name_can_be_given(models: dict[str, Path], tmp_path: Path) -> None:
    """The advice of the error works."""
    record = {"frage": "Name a fruit.", "zusatz": "a red one", "antwort": "apple"}
    with pytest.raises(DataError, match="frage, zusatz, antwort are those of no known form.*set "):
        _ = load(tmp_path, models["tools"], [record] * 4).train
    for columns, form, whole in (
        ("frage,antwort", "auto", ALPACA),
        (
            "frage,zusatz,antwort",
            "instruction",
            "### Input:\na red one\n\n### Response:\napple</s>",
        ),
        ("frage,antwort", "prompt-completion", "<s>Name a fruit.apple</s>"),
        ("frage", "auto", "<s>Name a fruit.</s>"),
    ):
        changes = {"data.input-column": columns, "data.format": form}
        assert texts(load(tmp_path, models["tools"], [record] * 4, **changes))[0].endswith(whole)
    with pytest.raises(DataError, match="no column 'fruit', which data.input-column names"):
        _ = load(tmp_path, models["tools"], [record], **{"data.input-column": "fruit"}).train
    changes = {"data.input-column": "frage", "data.format": "instruction"}
    with pytest.raises(DataError, match="names 1 columns; data.format instruction takes"):
        _ = load(tmp_path, models["tools"], [record], **changes).train


def test_turns_systems_and_tools_are_the_templates(models: dict[str, Path], tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "weather in Rome"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "sunny"},
    ]
    listed = [{"name": "weather"}]
    task = load(tmp_path, models["tools"], [{"messages": messages, "tools": listed}] * 3)
    whole, target = texts(task)
    assert whole == (
        "<tools>weather;</tools><system>Be brief.</s><user>weather in Rome</s>"
        "<assistant>[call weather]</s><tool>sunny</s><assistant>sunny</s>"
    )
    assert target == "[call weather]</s>sunny</s>"
    shared = [
        {"from": "human", "value": "weather in Rome"},
        {"from": "function_call", "value": json.dumps(call["function"])},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "sunny"},
    ]
    record = {"conversations": shared, "system": "Be brief.", "tools": json.dumps(listed)}
    assert texts(load(tmp_path, models["tools"], [record] * 3)) == (whole, target)
    instruction = {
        "instruction": "Name a fruit.", "output": "apple", "system": "Be brief.",
        "history": [["weather in Rome", "sunny"]],
    }  # fmt: skip
    changes = {"data.template": "chat"}
    assert texts(load(tmp_path, models["tools"], [instruction] * 3, **changes))[0] == (
        "<system>Be brief.</s><user>weather in Rome</s><assistant>sunny</s>"
        "<user>Name a fruit.</s><assistant>apple</s>"
    )
    with pytest.raises(RecordError, match="has a history of earlier turns: set data.template"):
        _ = load(tmp_path, models["tools"], [instruction] * 3).train


def test_rows_that_a_template_refuses(models: dict[str, Path], tmp_path: Path) -> None:
    """Gemma's and Mistral's templates take no system turn; two of 24 records have one."""
    system = {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}
    records = [system if row in (5, 17) else {"messages": TURNS} for row in range(24)]
    with pytest.raises(RecordError, match="row 5 cannot be encoded: System role not") as caught:
        _ = load(tmp_path, models["strict"], records).train
    assert (caught.value.row, caught.value.fault) == (5, "encoding")
    skip = {"data.bad-records": "skip"}
    task = load(tmp_path, models["strict"], records, **skip)
    assert len(task.train) + len(task.test) == 22
    assert task.train.collate(range(len(task.train)))["input_ids"].shape[0] == len(task.train)


def test_values_that_are_false_are_values(models: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_for(tmp_path, models["tools"])
    for value, text in ((0, "0"), ("", ""), (False, "False"), (0.0, "0.0")):
        record = {"instruction": "a", "output": "b", "answer": value, "choices": [value, 1]}
        passage = as_passage(record, settings)
        assert passage.expected == text and passage.choices == (text, "1")
        if value != "":
            passage = as_passage({"instruction": 0, "input": value, "output": value}, settings)
            assert (passage.instruction, passage.context, passage.answer) == ("0", text, text)
    assert as_passage({"instruction": "a", "output": "b", "answer": None}, settings).expected == "b"
    records = [{"question": "a", "answer": value} for value in (0, False, 1.5, "x")]
    task = load(tmp_path, models["tools"], records)
    assert len(task.train) + len(task.test) == 4


def test_parts_are_found_by_the_best_known_name(models: dict[str, Path], tmp_path: Path) -> None:
    data = settings_for(tmp_path, models["tools"]).data
    for names, columns in (
        (("instruction", "input", "output", "text"),
         {"instruction": "instruction", "output": "output", "input": "input"}),
        (("question", "context", "response", "answer"),
         {"instruction": "question", "output": "response", "input": "context", "answer": "answer"}),
        (("prompt", "output"), {"instruction": "prompt", "output": "output"}),
    ):  # fmt: skip
        assert find_reading(names, data).columns == columns


def test_plain_text_files(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes("one line\r\n\r\nüber zwei\r\n".encode("cp1252"))
    (tmp_path / "test.txt").write_text("three\n")
    task = load_task(settings_for(tmp_path, models["tools"], **{"data.test": "test"}))
    assert (len(task.train), len(task.test)) == (2, 1)
    assert task.train.examples.inputs[1] == {"text": "über zwei"}


def test_nothing_to_learn_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    records = [{"text": "one two"}, {"text": "\u200b"}, {"text": "  "}]
    with pytest.raises(RecordError, match="row 2 holds '  ' in column 'text', expected text"):
        _ = load(tmp_path, models["tools"], records).train
