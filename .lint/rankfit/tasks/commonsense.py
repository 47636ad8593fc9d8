"""The commonsense suite: eight tasks as LLM-Adapters writes them down (arXiv:2304.01933).

Each instruction ends with its answer format (``Answer format: answer1/answer2/answer3``). An
answer is the first match of the task's pattern in what the model wrote, and is right if it equals
the record's answer.
"""

import re
from collections.abc import Mapping
from typing import Any

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
