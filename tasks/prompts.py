"""From a record of language data to text: one prompt, the same in training and evaluation."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankfit.configs.learning import Data
from rankfit.configs.settings import RunSettings, split_list
from rankfit.tasks.records import DataError, Reading

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
#: Who speaks, by the names that data sets have for them.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
#: Names that data sets have for the parts of a record, the best known first.
_QUESTION = ("instruction", "question", "query", "prompt", "problem", "user")
_CONTEXT = ("input", "context")
_ANSWER = ("output", "response", "answer", "completion", "target", "solution", "assistant")
#: Forms in the order in which they are looked for, and the names of each part that it needs.
_FORMS: tuple[tuple[str, Mapping[str, Sequence[str]]], ...] = (
    ("messages", {"messages": ("messages",)}),
    ("sharegpt", {"messages": ("conversations", "conversation")}),
    ("prompt-completion", {"prompt": ("prompt",), "completion": ("completion",)}),
    ("instruction", {"instruction": _QUESTION, "output": _ANSWER}),
    ("instruction", {"instruction": ("input",), "output": _ANSWER}),
    ("text", {"text": ("text", "content")}),
)
#: Parts that a record of a form may have.
_OPTIONAL: Mapping[str, Mapping[str, Sequence[str]]] = {
    "messages": {"system": ("system",), "tools": ("tools",)},
    "sharegpt": {"system": ("system",), "tools": ("tools",)},
    "instruction": {"input": _CONTEXT, "system": ("system",), "history": ("history",)},
}
#: Names of columns by which a file of language data is known.
KNOWN_COLUMNS = tuple(
    dict.fromkeys(name for _, parts in _FORMS for names in parts.values() for name in names)
)


@dataclass(frozen=True)
class Segment:
    """Text of an example; ``target`` where it is an answer."""

    text: str
    target: bool


@dataclass(frozen=True)
class Passage:
    """One record of language data.

    Attributes
    ----------
    turns : tuple of dict
        Messages as a chat template takes them: ``role``, ``content`` and what else they have.
    chat : bool
        The record is a conversation, whatever ``data.template`` says.
    prompt : str
        What stands before the answer as it is (prompt and completion).
    instruction, context : str
        Of an instruction record ("" = none).
    answer : str
        What the model should write last: the output, the last assistant message, or the text.
    expected : str
        What an evaluation compares with: the column ``answer`` if there is one, else the answer.
    choices : tuple of str
        Answers to choose from (column ``choices``).
    tools : tuple
        Descriptions of the tools that the template lists.
    """

    turns: tuple[Mapping[str, Any], ...] = ()
    chat: bool = False
    prompt: str = ""
    instruction: str = ""
    context: str = ""
    answer: str = ""
    expected: str = ""
    choices: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()


def find_reading(names: Sequence[str], data: Data) -> Reading:
    """Find out how records with columns of these names are read.

    ``data.input-column`` names the columns, ``data.format`` the form; what is not set is
    recognised by the names.

    Raises
    ------
    DataError
        If no form has these columns.
    """
    own = split_list(data.input_column)
    if own:
        return _declared(names, own, data.format)
    known = {name.strip().casefold(): name for name in reversed(names)}
    for form, parts in _FORMS:
        columns = {
            part: next((known[name] for name in wanted if name in known), "")
            for part, wanted in parts.items()
        }
        if data.format in ("auto", form) and all(columns.values()):
            taken = set(columns.values())
            for part, wanted in _OPTIONAL.get(form, {}).items():
                found = next((known[name] for name in wanted if name in known), "")
                columns |= {part: found} if found and found not in taken else {}
            return Reading(form, columns | _evaluated(names, taken))
    # The other of two spellings of a conversation is as good.
    other = {"messages": "sharegpt", "sharegpt": "messages"}.get(data.format)
    if other and any({"messages", "conversations", "conversation"} & {name} for name in known):
        return find_reading(names, data.model_copy(update={"format": other}))
    raise DataError(_unknown(names, data.format))


def _declared(names: Sequence[str], own: Sequence[str], form: str) -> Reading:
    """Columns that ``data.input-column`` names: a text, or question (, input) and answer."""
    for name in own:
        if name not in names:
            raise DataError(
                f"there is no column {name!r}, which data.input-column names; the columns are "
                f"{', '.join(names)}"
            )
    if form == "auto":
        chats = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
        form = "instruction" if len(own) > 1 else chats.get(own[0].casefold(), "text")
    forms: dict[str, dict[int, tuple[str, ...]]] = {
        "instruction": {
            2: ("instruction", "output"), 3: ("instruction", "input", "output"),
        },
        "prompt-completion": {2: ("prompt", "completion")},
        "text": {1: ("text",)},
        "messages": {1: ("messages",)},
        "sharegpt": {1: ("messages",)},
    }  # fmt: skip
    parts = forms[form]
    if len(own) not in parts:
        raise DataError(
            f"data.input-column names {len(own)} columns; data.format {form} takes "
            f"{' or '.join(', '.join(each) for each in parts.values())}"
        )
    columns = dict(zip(parts[len(own)], own, strict=True))
    optional = {
        p: p for p in ("system", "tools") if p in names and form in ("messages", "sharegpt")
    }
    return Reading(form, columns | optional | _evaluated(names, set(own)))


def _evaluated(names: Sequence[str], taken: set[str]) -> dict[str, str]:
    """Columns that only an evaluation reads."""
    return {p: p for p in ("answer", "choices") if p in names and p not in taken}


def _unknown(names: Sequence[str], form: str) -> str:
    parts = next((parts for known, parts in _FORMS if known == form), None)
    known = {name.strip().casefold() for name in names}
    if parts is not None:
        missing = next(each[0] for each in parts.values() if not set(each) & known)
        return (
            f"there is no column {missing!r}; the columns are {', '.join(names)}: set "
            "data.input-column or data.format"
        )
    return (
        f"the columns {', '.join(names)} are those of no known form (messages; conversations; "
        "prompt and completion; instruction and output; text): set data.input-column to the column "
        "of a text, or to those of question and answer"
    )


def as_passage(
    record: Mapping[str, Any], settings: RunSettings, reading: Reading | None = None
) -> Passage:
    """Read a record; ``reading`` is found by its own names where it is not given.

    Raises
    ------
    DataError
        If a part is missing or no text.
    """
    reading = reading or find_reading(tuple(record), settings.data)
    parts = {part: record.get(column) for part, column in reading.columns.items()}
    names = reading.columns
    choices = tuple(_plain(choice) for choice in _list(parts.get("choices")))

    def expected(answer: str) -> str:
        own = parts.get("answer")
        return answer if own is None else _plain(own)

    if reading.form == "text":
        text = _text(parts, "text", names)
        return Passage(answer=text, expected=text)
    if reading.form in ("messages", "sharegpt"):
        turns = _turns(parts["messages"], names["messages"], _optional(parts, "system"))
        answer = str(turns[-1]["content"] or "")
        tools = tuple(_list(parts.get("tools")))
        return Passage(
            turns, True, answer=answer, expected=expected(answer), choices=choices, tools=tools
        )
    if reading.form == "prompt-completion":
        return _completion(parts, names, choices, expected)
    instruction, output = _text(parts, "instruction", names), _text(parts, "output", names)
    context, system = _optional(parts, "input"), _optional(parts, "system")
    asked = f"{instruction}\n\n{context}" if context else instruction
    turns = (
        *([{"role": "system", "content": system}] if system else []),
        *_history(parts.get("history")),
        {"role": "user", "content": asked},
        {"role": "assistant", "content": output},
    )
    if len(turns) > 2 and settings.data.template != "chat":
        if _list(parts.get("history")):
            raise DataError("has a history of earlier turns: set data.template to chat")
        instruction = f"{system}\n\n{instruction}"
    return Passage(
        turns,
        instruction=instruction,
        context=context,
        answer=output,
        expected=expected(output),
        choices=choices,
    )


def _completion(
    parts: Mapping[str, Any], names: Mapping[str, str], choices: tuple[str, ...], expected: Any
) -> Passage:
    """Prompt and completion: texts that follow one another as they are, or lists of messages."""
    if isinstance(parts["prompt"], list):
        both = [*parts["prompt"], *_list(parts["completion"])]
        turns = _turns(both, names["completion"], "")
        answer = str(turns[-1]["content"] or "")
        return Passage(turns, True, answer=answer, expected=expected(answer), choices=choices)
    prompt, answer = _text(parts, "prompt", names), _text(parts, "completion", names)
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Passage(turns, prompt=prompt, answer=answer, expected=expected(answer), choices=choices)


def is_chat(passage: Passage, settings: RunSettings) -> bool:
    """Whether the tokenizer's chat template writes a passage, and opens and ends it."""
    return passage.chat or (bool(passage.turns) and settings.data.template == "chat")


def segments(passage: Passage, settings: RunSettings, tokenizer: Any) -> list[Segment]:
    """The text of a passage in parts; the last one is the answer.

    What stands before it is the prompt, in training and in evaluation alike.

    Raises
    ------
    DataError
        If the tokenizer has no chat template, or one that changes what came before.
    """
    if is_chat(passage, settings):
        return _chat(passage, tokenizer)
    prompt = passage.prompt
    if passage.instruction and settings.data.template == "plain":
        context = f"\n\n{passage.context}" if passage.context else ""
        prompt = f"{passage.instruction}{context}\n"
    elif passage.instruction:
        form = _ALPACA_INPUT if passage.context else _ALPACA
        prompt = form.format(instruction=passage.instruction, input=passage.context)
    return [*([Segment(prompt, False)] if prompt else []), Segment(passage.answer, True)]


def prompt_of(parts: Sequence[Segment]) -> str:
    """What stands before the last answer."""
    return "".join(part.text for part in parts[:-1])


def question(text: str, form: str) -> Passage:
    """An instruction that has no answer yet, as a passage of a form."""
    turns = ({"role": "user", "content": text},)
    if form in ("text", "prompt-completion"):
        return Passage(turns if form == "prompt-completion" else (), prompt=text)
    return Passage(turns, form != "instruction", instruction=text)


def render_prompt(passage: Passage, settings: RunSettings, tokenizer: Any) -> str:
    """The prompt of a question, as the run's examples have it."""
    if is_chat(passage, settings):
        return _template(passage.turns, passage.tools, tokenizer, True)
    return prompt_of(segments(passage, settings, tokenizer))


def _chat(passage: Passage, tokenizer: Any) -> list[Segment]:
    """Render turn by turn with the tokenizer's own template; each answer is a target."""
    parts: list[Segment] = []
    done = ""
    for index, turn in enumerate(passage.turns):
        if turn["role"] != "assistant":
            continue
        if not index:
            continue  # nobody asked: it is what the answers after it follow
        before = _template(passage.turns[:index], passage.tools, tokenizer, True)
        after = _template(passage.turns[: index + 1], passage.tools, tokenizer, False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                "the tokenizer's chat template changes earlier turns when later ones come: answers "
                "cannot be told apart; use data.template alpaca or plain, or another tokenizer"
            )
        answer = after[len(before) :]
        _refuse_unwritten(turn, answer)
        parts += [Segment(before[len(done) :], False), Segment(answer, _is_target(turn))]
        done = after
    if not parts:
        raise DataError("has no answer that follows something")
    return parts


def _is_target(turn: Mapping[str, Any]) -> bool:
    """Whether an answer is a target: OpenAI's ``weight`` or axolotl's ``train`` may say no."""
    return turn.get("weight") != 0 and turn.get("train") is not False


def _refuse_unwritten(turn: Mapping[str, Any], answer: str) -> None:
    """Refuse calls of tools that a chat template leaves out: an empty answer would be learned."""
    for call in turn.get("tool_calls") or ():
        name = call.get("function", call).get("name", "") if isinstance(call, Mapping) else ""
        if str(name) not in answer:
            raise DataError(
                f"calls the tool {name!r}, which the tokenizer's chat template does not write: use "
                "a model whose template knows tools, or leave such conversations out"
            )


def _template(
    turns: Sequence[Mapping[str, Any]], tools: Sequence[Any], tokenizer: Any, opens: bool
) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template: set data.template to alpaca or plain (and "
            "data.format to instruction), or use a model that has one"
        )
    listed = {"tools": list(tools)} if tools else {}
    text: str = tokenizer.apply_chat_template(
        [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=opens, **listed
    )
    return text


def _text(parts: Mapping[str, Any], part: str, names: Mapping[str, str]) -> str:
    """Text of a part; a number or truth value is its text, 0 and False too."""
    value = parts.get(part)
    text = _plain(value) if isinstance(value, str | bool | int | float) else ""
    if not text.strip():
        raise DataError(f"holds {value!r} in column {names[part]!r}, expected text")
    return text


def _plain(value: Any) -> str:
    return str(value)


def _optional(parts: Mapping[str, Any], part: str) -> str:
    value = parts.get(part)
    return "" if value is None else _plain(value)


def _list(value: Any) -> list[Any]:
    """A list, maybe written as JSON or as Python has it (pandas' CSV); [] where there is none."""
    if isinstance(value, str):
        if not value.strip():
            return []
        value = _read_list(value)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"holds {value!r}, expected a list")
    return list(value)


def _read_list(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"holds {text!r}, expected a list, as JSON in a table of text") from error


def _history(pairs: Any) -> list[dict[str, Any]]:
    """Earlier turns of an instruction: pairs of question and answer."""
    turns = []
    for pair in _list(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"holds {pair!r} in its history, expected pairs of texts")
        turns += [
            {"role": "user", "content": _plain(pair[0])},
            {"role": "assistant", "content": _plain(pair[1])},
        ]
    return turns


def _turns(value: Any, column: str, system: str) -> tuple[Mapping[str, Any], ...]:
    """Messages of a conversation in the words of chat templates, the last one an answer."""
    turns = _list(value) if isinstance(value, str) else value
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f"holds {turns!r} in column {column!r}, expected a list of messages")
    messages = [_turn(turn) for turn in turns]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if messages[-1]["role"] != "assistant":
        raise DataError("ends with a message of another role than assistant")
    return tuple(messages)


def _turn(turn: Any) -> dict[str, Any]:
    """One message: ``role`` and ``content``, or ShareGPT's ``from`` and ``value``."""
    given = dict(turn) if isinstance(turn, Mapping) else {}
    spoken = given.pop("role", None) or given.pop("from", None)
    content = given.pop("content", None)
    content = given.pop("value", None) if content is None else content
    role = _ROLES.get(str(spoken).strip().casefold())
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text") or "") for part in content)
    rest = {name: value for name, value in given.items() if value is not None}
    if spoken == "function_call":
        rest, content = _call(content), None
    if role == "assistant" and isinstance(rest.get("function_call"), Mapping):  # OpenAI's old form
        rest["tool_calls"] = [{"type": "function", "function": rest.pop("function_call")}]
    if isinstance(rest.get("tool_calls"), list):
        rest["tool_calls"] = [_parsed_call(call) for call in rest["tool_calls"]]
    calls = role == "assistant" and rest.get("tool_calls")
    if role is None or not (isinstance(content, str) or (content is None and calls)):
        raise DataError(
            f"holds the message {turn!r}, expected role (one of system, user, assistant, tool) and "
            "content"
        )
    if role == "assistant" and not calls and not str(content).strip():
        raise DataError("has an empty answer, which would be learned")
    return {"role": role, "content": "" if content is None else content, **rest}


def _parsed_call(call: Any) -> Any:
    """A call with its arguments as a mapping: OpenAI's are JSON text, which templates quote."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _call(content: Any) -> dict[str, Any]:
    """A call of tools that an answer makes, of LLaMA-Factory's ``function_call``."""
    try:
        calls = json.loads(content)
    except (TypeError, ValueError) as error:
        raise DataError(f"holds the function call {content!r}, expected JSON") from error
    calls = calls if isinstance(calls, list) else [calls]
    return {"tool_calls": [{"type": "function", "function": call} for call in calls]}


#: Task by the name of its folder in LLM-Adapters, and the family of its answers.
FAMILIES = {
    "ARC-Challenge": "answer",
    "ARC-Easy": "answer",
    "boolq": "truth",
    "hellaswag": "ending",
    "openbookqa": "answer",
    "piqa": "solution",
    "social_i_qa": "answer",
    "winogrande": "option",
}
#: All names that :func:`task_of` gives, too.
NAMES = {*FAMILIES, "multiple-choice", "other"}
_PATTERNS = {
    "truth": "true|false",
    "solution": "solution1|solution2",
    "answer": "answer1|answer2|answer3|answer4|answer5",
    "ending": "ending1|ending2|ending3|ending4",
    "option": "option1|option2",
}
_FORMAT = re.compile(r"[Aa]nswer format:\s*(\w+(?:/\w+)+)")
#: What stands before the answer in a record's output.
PREFIX = "the correct answer is "


def choices_of(instruction: str) -> tuple[str, ...]:
    """Answers that an instruction allows, () if it names none."""
    found = _FORMAT.findall(instruction)
    return tuple(found[-1].split("/")) if found else ()


def family_of(answer: str) -> str:
    """Family of answers that one belongs to ("" = none)."""
    return next((f for f, pattern in _PATTERNS.items() if re.fullmatch(pattern, answer)), "")


def extract(text: str, expected: str) -> str:
    """First answer of the expected one's family in what was written ("" = none)."""
    family = family_of(expected)
    found = re.search(_PATTERNS[family], text) if family else None
    return found.group() if found else ""


def task_of(record: Mapping[str, Any]) -> str:
    """Kind of task of a record that does not name it, by its answer format.

    ARC and OpenBookQA share one and cannot be told apart.
    """
    choices = choices_of(str(record.get("instruction") or ""))
    family = family_of(choices[0]) if choices else ""
    if family == "answer":
        return "social_i_qa" if len(choices) == 3 else "multiple-choice"
    names = {"truth": "boolq", "solution": "piqa", "ending": "hellaswag", "option": "winogrande"}
    return names.get(family, "other")
