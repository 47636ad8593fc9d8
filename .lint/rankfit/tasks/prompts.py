"""From a record of language data to text: one prompt, the same in training and evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankfit.configs.settings import RunSettings
from rankfit.tasks.raw import DataError

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Segment:
    """Text of an example; ``learnt`` where it is an answer."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Passage:
    """One record of language data.

    Attributes
    ----------
    messages : tuple of (role, text)
        Conversation; empty for plain text.
    instruction, context : str
        Of an instruction record ("" = none).
    answer : str
        What the model should write last: the output, the last assistant message, or the text.
    expected : str
        What an evaluation compares with: the column ``answer`` if there is one, else the answer.
    choices : tuple of str
        Answers to choose from (column ``choices``).
    """

    messages: tuple[tuple[str, str], ...]
    instruction: str
    context: str
    answer: str
    expected: str
    choices: tuple[str, ...]


def as_passage(record: Mapping[str, Any], settings: RunSettings) -> Passage:
    """Read a record of ``data.format``.

    Raises
    ------
    DataError
        If a part is missing or no text.
    """
    kind = settings.data.format
    choices = tuple(str(choice) for choice in record.get("choices") or ())
    if kind == "text":
        text = _text(record, "text")
        return Passage((), "", "", text, text, ())
    if kind == "messages":
        messages = _messages(record)
        answer = messages[-1][1]
        return Passage(messages, "", "", answer, str(record.get("answer") or answer), choices)
    instruction, output = _text(record, "instruction"), _text(record, "output")
    context = str(record.get("input") or "")
    asked = f"{instruction}\n\n{context}" if context else instruction
    expected = str(record.get("answer") or output)
    messages = (("user", asked), ("assistant", output))
    return Passage(messages, instruction, context, output, expected, choices)


def segments(passage: Passage, settings: RunSettings, tokenizer: Any) -> list[Segment]:
    """The text of a passage in parts; the last one is the answer.

    What stands before it is the prompt, in training and in evaluation alike.

    Raises
    ------
    DataError
        If the tokenizer has no chat template, or one that changes what came before.
    """
    if not passage.messages:
        return [Segment(passage.answer, True)]
    if settings.data.format == "messages" or settings.data.template == "chat":
        return _chat(passage.messages, tokenizer)
    if settings.data.template == "plain":
        return [Segment(passage.messages[0][1] + "\n", False), Segment(passage.answer, True)]
    prompt = (_ALPACA_INPUT if passage.context else _ALPACA).format(
        instruction=passage.instruction, input=passage.context
    )
    return [Segment(prompt, False), Segment(passage.answer, True)]


def prompt_of(parts: Sequence[Segment]) -> str:
    """What stands before the last answer."""
    return "".join(part.text for part in parts[:-1])


def render_prompt(text: str, settings: RunSettings, tokenizer: Any) -> str:
    """The prompt of one instruction that has no answer yet, as the run's examples have it."""
    if settings.data.format == "text":
        return text
    passage = Passage((("user", text), ("assistant", "")), text, "", "", "", ())
    if settings.data.format == "messages" or settings.data.template == "chat":
        return _template(passage.messages[:-1], tokenizer, True)
    return prompt_of(segments(passage, settings, tokenizer))


def _chat(messages: Sequence[tuple[str, str]], tokenizer: Any) -> list[Segment]:
    """Render turn by turn with the tokenizer's own template; each answer is learnt."""
    parts: list[Segment] = []
    done = ""
    for index, (role, _) in enumerate(messages):
        if role != "assistant":
            continue
        before = _template(messages[:index], tokenizer, True)
        after = _template(messages[: index + 1], tokenizer, False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                "the tokenizer's chat template changes earlier turns when later ones come: answers "
                "cannot be told apart; use data.template alpaca or plain, or another tokenizer"
            )
        parts += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    return parts


def _template(messages: Sequence[tuple[str, str]], tokenizer: Any, opens: bool) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template: set data.template to alpaca or plain (and "
            "data.format to instruction), or use a model that has one"
        )
    turns = [{"role": role, "content": text} for role, text in messages]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opens)
    return text


def _text(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"holds {value!r} in column {column!r}, expected text")
    return value


def _messages(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    turns = record.get("messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"holds {turns!r} in column 'messages', expected a list of messages")
    messages = []
    for turn in turns:
        role, text = (turn or {}).get("role"), (turn or {}).get("content")
        if role not in _ROLES or not isinstance(text, str):
            raise DataError(
                f"holds the message {turn!r}, expected role (one of {', '.join(_ROLES)}) and "
                "content"
            )
        messages.append((role, text))
    if messages[-1][0] != "assistant":
        raise DataError("ends with a message of another role than assistant")
    return tuple(messages)
