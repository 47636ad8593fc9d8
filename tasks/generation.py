"""Evaluation of a language model: what it writes, or which of the choices it finds likeliest."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from rankfit.tasks.lora import chunks, count_targets
from rankfit.tasks.metrics import scores
from rankfit.tasks.packing import IGNORED
from rankfit.tasks.prompts import PREFIX, Passage, choices_of, extract
from rankfit.tasks.records import DataError
from rankfit.tasks.task import Split

if TYPE_CHECKING:
    from rankfit.tasks.language_model import LanguageTask

#: An example: prompt and what may follow it, as tokens.
Pair = tuple[list[int], list[int]]


@torch.no_grad()
def evaluate(
    task: "LanguageTask",
    model: nn.Module,
    split: Split,
    rows: Sequence[int],
    device: torch.device,
    size: int,
) -> dict[str, float]:
    """Measure a model on some examples of a split.

    ``loss`` is the mean negative log-likelihood of a target token. Unless ``task.evaluate`` is
    ``loss``, ``accuracy`` is the share of right answers, the mean over the groups of the data
    (``TASK.accuracy`` of each), with the ends ``low`` and ``high`` of a 95 % interval.

    Parameters
    ----------
    size : int
        Examples per batch.

    Raises
    ------
    DataError
        If there is nothing to measure on, or an example has no choices that its likelihoods could
        be compared of.
    """
    if not len(rows):
        raise DataError(
            "the evaluation has no examples: give data.test, or another data.test-...",
            fault="data-empty",
        )
    was_training = model.training
    model.eval()
    try:
        figures = {"loss": _loss(model, split, rows, device, size)}
        if task.settings.task.evaluate == "loss":
            return figures
        passages = task.passages(split, rows)
        if task.settings.task.evaluate == "likelihood":
            right = _likeliest(task, model, passages, device, size)
        else:
            right = _written(task, model, passages, device, size)
        names = task.class_names
        if not task.tells_groups:
            return scores(right, [""] * len(rows), several=False) | figures
        groups = [names[int(split.labels[row])] for row in rows]
        return scores(right, groups, several=len(names) > 1) | figures
    finally:
        model.train(was_training)


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    device: torch.device,
    *,
    size: int,
    new_tokens: int,
) -> list[str]:
    """Let a model go on greedily from each prompt; padded on the left, where generation needs it.

    Prompts of like length share a batch.
    """
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=_ends(model, tokenizer),
        use_cache=True,
    )
    for part in chunks(order, size):
        longest = max(len(prompts[index]) for index in part)
        tokens = torch.full((len(part), longest), int(tokenizer.pad_token_id))
        mask = torch.zeros_like(tokens)
        for row, index in enumerate(part):
            tokens[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        written = model.generate(
            input_ids=tokens.to(device), attention_mask=mask.to(device), generation_config=config
        )[:, longest:]
        decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
        for index, text in zip(part, decoded, strict=True):
            texts[index] = text.strip()
    return texts


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end a text: the tokenizer's, and those that the model names (end of a turn)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends) or None


def _written(
    task: "LanguageTask", model: nn.Module, passages: Sequence[Passage], device: Any, size: int
) -> list[bool]:
    prompts = [task.encoder.prompt(passage, task.room) for passage in passages]
    new_tokens = task.settings.task.max_new_tokens
    tokenizer = task.encoder.tokenizer
    texts = write(model, tokenizer, prompts, device, size=size, new_tokens=new_tokens)
    if task.settings.task.suite == "commonsense":
        texts = [
            extract(text, passage.expected) for text, passage in zip(texts, passages, strict=True)
        ]
    return [t == p.expected.strip() for t, p in zip(texts, passages, strict=True)]


def _likeliest(
    task: "LanguageTask", model: nn.Module, passages: Sequence[Passage], device: Any, size: int
) -> list[bool]:
    """Compare the summed log-likelihoods of the choices after the prompt."""
    suite = task.settings.task.suite == "commonsense"
    pairs: list[Pair] = []
    options: list[tuple[str, ...]] = []
    for passage in passages:
        choices = passage.choices
        if suite and not choices:
            choices = choices_of(passage.instruction)
        if passage.expected not in choices:
            raise DataError(
                f"the choices {choices!r} of {passage.instruction[:60]!r} do not hold its answer "
                f"{passage.expected!r}: task.evaluate=likelihood needs a column 'choices', or the "
                "answer format of task.suite=commonsense"
            )
        options.append(choices)
        prefix = PREFIX if suite else ""
        answers = [task.encoder.answer(prefix + choice) for choice in choices]
        room = task.settings.data.max_length - max(len(answer) for answer in answers)
        prompt = task.encoder.prompt(passage, max(2, room))
        pairs += [(prompt, answer) for answer in answers]
    found = iter(log_likelihoods(model, pairs, device, size, task.encoder.tokenizer.pad_token_id))
    right = []
    for passage, choices in zip(passages, options, strict=True):
        values = [next(found) for _ in choices]
        right.append(choices[values.index(max(values))] == passage.expected)
    return right


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, pairs: Sequence[Pair], device: torch.device, size: int, pad: int
) -> list[float]:
    """Sum of log p over the second part's tokens, given the first, of each pair."""
    values = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for part in chunks(order, size):
        longest = max(len(pairs[i][0]) + len(pairs[i][1]) for i in part)
        tokens = torch.full((len(part), longest), int(pad))
        mask = torch.zeros_like(tokens)
        counted = torch.zeros(len(part), longest, dtype=torch.bool)
        for row, index in enumerate(part):
            before, after = pairs[index]
            whole = [*before, *after]
            tokens[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
            counted[row, len(before) : len(whole)] = True
        tokens = tokens.to(device)
        logits = model(input_ids=tokens, attention_mask=mask.to(device)).logits  # (b, t, v)
        costs = _token_losses(logits, tokens).cpu()  # (b, t - 1)
        sums = (costs * counted[:, 1:]).sum(dim=1)
        for row, index in enumerate(part):
            values[index] = -float(sums[row])
    return values


def _token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first, (b, t - 1), float32."""
    return cross_entropy(
        logits[:, :-1].float().transpose(1, 2),
        tokens[:, 1:],
        reduction="none",
        ignore_index=IGNORED,
    )


def _loss(
    model: nn.Module, split: Split, rows: Iterable[int], device: torch.device, size: int
) -> float:
    """Mean over all target tokens."""
    total, count = 0.0, 0
    for part in chunks(list(rows), size):
        batch = {name: tensor.to(device) for name, tensor in split.collate(part).items()}
        labels = batch.pop("labels")
        costs = _token_losses(model(**batch).logits, labels)
        total += float(costs.sum())
        count += count_targets(labels)
    return total / max(1, count)
