"""The commonsense suite: formats, prompts, extraction, and scores through the whole path."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.configs.settings import RunSettings, from_flat
from rankfit.tasks import load_task
from rankfit.tasks import metrics as intervals
from rankfit.tasks.language_model import LanguageTask
from rankfit.tasks.metrics import pooled, scores
from rankfit.tasks.prompts import FAMILIES, choices_of, extract, family_of, task_of

#: One record of each task as LLM-Adapters writes it down.
RECORDS = {
    "ARC-Challenge": (
        "Please choose the correct answer to the question: Which is a mammal?\n\nAnswer1: a frog "
        "Answer2: a whale Answer3: a shark Answer4: a crab Answer5: a newt\n\nAnswer format: "
        "answer1/answer2/answer3/answer4/answer5",
        "answer2",
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: Which is hot?\n\nAnswer1: ice Answer2: "
        "snow Answer3: the sun Answer4: rain\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer3",
    ),
    "boolq": (
        "Please answer the following question with true or false, question: is the sky blue?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Cooking: He cuts bread. "
        "He\n\nEnding1: flies away. Ending2: eats it. Ending3: reads it. Ending4: sinks.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: Fog is likely around\n\nAnswer1: a "
        "marsh Answer2: a tundra Answer3: the plains Answer4: a desert\n\nAnswer format: "
        "answer1/answer2/answer3/answer4",
        "answer1",
    ),
    "piqa": (
        "Please choose the correct solution to the question: To cool a drink\n\nSolution1: add "
        "ice\n\nSolution2: add fire\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Ann helped Bo. How does Bo feel?\n\n"
        "Answer1: grateful Answer2: angry Answer3: hungry\n\nAnswer format: "
        "answer1/answer2/answer3",
        "answer1",
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "The cup did not fit the box because _ was too big.\n\nOption1: the cup Option2: the box"
        "\n\nAnswer format: option1/option2",
        "option1",
    ),
}


def record(task: str) -> dict[str, str]:
    instruction, answer = RECORDS[task]
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local stand-in of LLM-Adapters' repository, and a model."""
    root = tmp_path_factory.mktemp("llm-adapters")
    (root / "ft-training_set").mkdir()
    everything = [record(task) for task in RECORDS] * 2
    (root / "ft-training_set" / "commonsense_170k.json").write_text(json.dumps(everything))
    for task in RECORDS:
        folder = root / "dataset" / task
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps([record(task)] * 3))
    texts = [one["instruction"] + one["output"] for one in everything]
    save_model(root / "model", save_tokenizer(root / "model", texts), hidden=32)
    return root


def settings_for(adapters: Path, **changes: object) -> RunSettings:
    tests = ", ".join(f"dataset/{task}/test.json" for task in RECORDS)
    flat = {
        "task.kind": "causal-lm",
        "task.suite": "commonsense",
        "model.source": str(adapters / "model"),
        "data.source": str(adapters),
        "data.train": "ft-training_set/commonsense_170k.json",
        "data.test": tests,
        "data.max-length": 384,
    }
    return from_flat(flat | changes)  # type: ignore[operator]


def load(adapters: Path, **changes: object) -> LanguageTask:
    task = load_task(settings_for(adapters, **changes))
    assert isinstance(task, LanguageTask)
    return task


@pytest.mark.parametrize("task", RECORDS)
def test_the_prompt_of_each_task_to_the_byte(adapters: Path, task: str) -> None:
    """What stands before the answer in training is what the model is asked in an evaluation."""
    instruction, answer = RECORDS[task]
    data = load(adapters)
    row = list(RECORDS).index(task)
    passage = data.passages(data.train, [row])[0]
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    )
    assert data.encoder.text(passage) == expected
    trained = data.train.collate([row])
    asked = data.encoder.prompt(passage, data.room)
    assert data.encoder.tokenizer.decode(asked) == "<s>" + expected
    assert trained["input_ids"][0, : len(asked)].tolist() == asked
    target = data.encoder.tokenizer.decode(trained["labels"][0][len(asked) :])
    assert target == f"the correct answer is {answer}</s>"
    assert family_of(answer) == FAMILIES[task]


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("the correct answer is true", "false", "true"),
        ("false or true", "true", "false"),
        ("solution2 because solution1 is wrong", "solution1", "solution2"),
        ("answer5", "answer1", "answer5"),
        ("the correct answer is ending4.", "ending4", "ending4"),
        ("I take option1", "option2", "option1"),
        ("option1", "answer1", ""),
        ("Answer1", "answer1", ""),
        ("", "true", ""),
        ("nothing of the kind", "ending1", ""),
    ],
)
def test_the_answer_is_the_first_match_of_its_family(text: str, expected: str, found: str) -> None:
    assert extract(text, expected) == found


def test_a_task_is_told_by_its_answer_format() -> None:
    for task in RECORDS:
        named = task_of(record(task))
        assert named == (task if task not in ("ARC-Challenge", "ARC-Easy", "openbookqa") else named)
        assert RECORDS[task][1] in choices_of(RECORDS[task][0])
    assert task_of(record("ARC-Easy")) == "multiple-choice"
    assert task_of({"instruction": "Name a fruit."}) == "other"


class Oracle(torch.nn.Module):
    """Answers each prompt by a rule, as a model would: through tokens."""

    def __init__(self, task: LanguageTask, rule) -> None:
        super().__init__()
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self._tokenizer, self._rule = task.encoder.tokenizer, rule
        self._size = len(self._tokenizer)

    def _answer(self, prompt: str) -> str:
        instruction = prompt.split("### Instruction:\n")[1].split("\n\n### Response:\n")[0]
        known = dict(RECORDS.values())
        return self._rule(known[instruction], choices_of(instruction))

    def generate(self, input_ids, attention_mask, generation_config):
        rows = []
        for tokens, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self._tokenizer.decode(tokens[mask.bool()], skip_special_tokens=True)
            text = f"the correct answer is {self._answer(prompt)}</s>"
            rows.append(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        longest = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id
        written = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        return torch.cat([input_ids, written], dim=1)

    def forward(self, input_ids, attention_mask):
        """Gives its own answer's tokens a high logit, whatever stands there."""
        logits = torch.zeros(*input_ids.shape, self._size)
        for row, tokens in enumerate(input_ids):
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            prompt = text.split("### Response:\n")[0] + "### Response:\n"
            answer = self._tokenizer(
                f"the correct answer is {self._answer(prompt)}", add_special_tokens=False
            )["input_ids"]
            logits[row, :, answer] = 20.0
        return SimpleNamespace(logits=logits)


def right(answer: str, choices: tuple[str, ...]) -> str:
    return answer


def wrong(answer: str, choices: tuple[str, ...]) -> str:
    return next(choice for choice in choices if choice != answer)


@pytest.mark.parametrize("evaluate", ["generation", "likelihood"])
@pytest.mark.parametrize(("rule", "expected"), [(right, 1.0), (wrong, 0.0)])
def test_a_model_that_is_always_right_scores_one_and_one_that_never_is_zero(
    adapters: Path, evaluate: str, rule, expected: float
) -> None:
    task = load(adapters, **{"task.evaluate": evaluate})
    model = Oracle(task, rule)
    rows = range(len(task.test))
    found = task.evaluate(model, task.test, rows, torch.device("cpu"), 5)
    assert len(rows) == 24 and found["accuracy"] == expected
    for name in RECORDS:
        assert found[f"{name}.accuracy"] == expected and found[f"{name}.examples"] == 3
    assert found["low"] == 0.0 if expected == 0 else found["high"] == 1.0
    assert found["high"] - found["low"] < found["boolq.high"] - found["boolq.low"]


def test_what_is_not_an_answer_counts_as_wrong(adapters: Path) -> None:
    task = load(adapters)
    model = Oracle(task, lambda answer, choices: "none of them")
    rows = range(len(task.test))
    assert task.evaluate(model, task.test, rows, torch.device("cpu"), 5)["accuracy"] == 0


def test_the_mean_is_over_tasks_not_over_examples() -> None:
    found = scores([True] * 9 + [False], ["one"] * 9 + ["two"], several=True)
    assert found["accuracy"] == 0.5 and found["one.accuracy"] == 1 and found["two.accuracy"] == 0


@pytest.mark.parametrize("several", [True, False])
def test_clients_are_pooled_as_if_their_examples_lay_in_one_place(several: bool) -> None:
    # The second client has examples of one group only.
    right = [[True, True, False, True, False], [False, False, True, False, True, True, True]]
    groups = [["one", "two", "two", "one", "one"], ["two"] * 7]
    if not several:
        groups = [["all"] * len(own) for own in groups]
    replies = [
        {"num-examples": len(own), "loss": float(len(own)), **scores(own, of, several=several)}
        for own, of in zip(right, groups, strict=True)
    ]
    whole = scores(sum(right, []), sum(groups, []), several=several)
    assert pooled([*replies, {"num-examples": 0}]) == pytest.approx(
        whole | {"loss": (25 + 49) / 12}
    )
    assert pooled([]) == {}


def test_intervals() -> None:
    assert intervals.wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert intervals.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = intervals.wilson(10, 10)
    assert high == 1.0 and low == pytest.approx(0.7225, abs=1e-4)
    assert intervals.of_mean([(5, 10)]) == pytest.approx(intervals.wilson(5, 10))
    two = intervals.of_mean([(5, 10), (5, 10)])
    assert two[1] - two[0] == pytest.approx((0.7634 - 0.2366) / 2**0.5, abs=1e-4)
    with pytest.raises(ValueError, match="3 right of 2"):
        intervals.wilson(3, 2)


@pytest.mark.shared_data
def test_the_local_parquet(shared_data: Path, adapters: Path) -> None:
    task = load(
        adapters,
        **{
            "data.source": str(shared_data / "commonsense"),
            "data.train": "commonsense_train",
            "data.test": "commonsense_test",
            "data.label-column": "task",
            "data.test-samples": 200,
        },
    )
    assert task.class_names == ("ARC-Easy", "boolq", "openbookqa")
    assert len(task.train) == 16635 and len(task.test) == 200
    for passage in task.passages(task.train, range(0, 16635, 50)):
        assert passage.expected in choices_of(passage.instruction)
        assert passage.answer == f"the correct answer is {passage.expected}"
