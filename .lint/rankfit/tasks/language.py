"""Causal language models: examples as tokens, padded or packed, and what an evaluation gives."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rankfit.configs.settings import RunSettings
from rankfit.tasks.adapted import IGNORED
from rankfit.tasks.data import Examples
from rankfit.tasks.models import load_config
from rankfit.tasks.prompts import Passage, as_passage, prompt_of, render_prompt, segments
from rankfit.tasks.sources import ModelError
from rankfit.tasks.task import Indices, Split, Task, TensorSpec
from rankfit.tasks.tokenizer import load_tokenizer, longest_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; ``learnt`` marks those that the loss is taken over."""

    tokens: tuple[int, ...]
    learnt: tuple[bool, ...]


class Encoder:
    """Turns passages and prompts into tokens.

    The parts of an example are tokenized one by one, so that the tokens of its prompt are those of
    the same prompt in an evaluation.

    Parameters
    ----------
    tokenizer
        With a padding token.
    settings : RunSettings
        The run.
    """

    def __init__(self, tokenizer: Any, settings: RunSettings) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        # Chat templates write the token themselves.
        chat = settings.data.format == "messages" or settings.data.template == "chat"
        first = tokenizer("a")["input_ids"][:1]
        self._opens = first if not chat and first == [tokenizer.bos_token_id] else []
        self._closes = [] if chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._warned = False

    def example(self, passage: Passage) -> Encoded:
        """Encode a passage; one that is too long loses the start of its prompt, not its answer."""
        everything = self._settings.task.loss == "all"
        tokens: list[int] = []
        learnt: list[bool] = []
        last: list[int] = []
        for part in segments(passage, self._settings, self.tokenizer):
            last = self._ids(part.text)
            tokens += last
            learnt += [part.learnt or everything] * len(last)
        tokens += self._closes
        learnt += [True] * len(self._closes)
        room = self._settings.data.max_length - len(self._opens)
        if len(tokens) > room:
            self._warn(len(tokens) + len(self._opens))
            answer = len(last) + len(self._closes)
            kept = slice(-room, None) if answer <= room else slice(-answer, room - answer or None)
            tokens, learnt = tokens[kept], learnt[kept]
        return Encoded((*self._opens, *tokens), (*(False for _ in self._opens), *learnt))

    def prompt(self, passage: Passage, room: int) -> list[int]:
        """Encode what stands before the last answer; its start goes where it is longer."""
        parts = segments(passage, self._settings, self.tokenizer)
        return self._cut([i for part in parts[:-1] for i in self._ids(part.text)], room)

    def question(self, text: str, room: int) -> list[int]:
        """Encode a prompt of a user's, written as the run's examples are."""
        return self._cut(self._ids(render_prompt(text, self._settings, self.tokenizer)), room)

    def text(self, passage: Passage) -> str:
        """What stands before the last answer, as text."""
        return prompt_of(segments(passage, self._settings, self.tokenizer))

    def answer(self, text: str) -> list[int]:
        """Encode an answer alone."""
        return self._ids(text)

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        return [*self._opens, *tokens[-max(1, room - len(self._opens)) :]]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _warn(self, length: int) -> None:
        if not self._warned:
            log.warning(
                "an example of %d tokens is cut to data.max-length %d (and maybe others): the start"
                " of its prompt goes",
                length, self._settings.data.max_length,
            )  # fmt: skip
        self._warned = True


@dataclass(frozen=True)
class LanguageTask(Task):
    """Next tokens of passages of at most ``data.max-length`` tokens."""

    @property
    def labels(self) -> int:
        """Not read by a language model; there are no classes."""
        return 2

    @cached_property
    def encoder(self) -> Encoder:
        """The run's way from text to tokens.

        Raises
        ------
        ModelError
            If ``data.max-length`` and ``task.max-new-tokens`` are more than the model can take.
        """
        tokenizer = load_tokenizer(self.settings.model)
        limit, wanted = self.longest, self.settings.data.max_length
        if limit is not None and wanted > limit:
            raise ModelError(
                f"data.max-length {wanted}: {self.settings.model.source} takes at most {limit} "
                "tokens"
            )
        if limit is not None and self.settings.task.max_new_tokens >= limit:
            raise ModelError(
                f"task.max-new-tokens {self.settings.task.max_new_tokens}: with a prompt that is "
                f"more than the {limit} tokens that {self.settings.model.source} takes"
            )
        return Encoder(tokenizer, self.settings)

    @cached_property
    def longest(self) -> int | None:
        """Tokens that the model has positions for (None = no end)."""
        return longest_text(load_config(self.settings.model, labels=2))

    @property
    def room(self) -> int:
        """Tokens that a prompt of an evaluation may have."""
        room = self.settings.data.max_length
        if self.longest is not None:
            room = min(room, self.longest - self.settings.task.max_new_tokens)
        return room

    def passages(self, split: Split, rows: Sequence[int]) -> list[Passage]:
        """Records of a split."""
        return [as_passage(split.examples.inputs[row], self.settings) for row in rows]

    def _measure(
        self, model: nn.Module, split: Split, rows: Sequence[int], device: torch.device, size: int
    ) -> dict[str, float]:
        """Loss of the answers, and how many are right; see :mod:`rankfit.tasks.answers`."""
        from rankfit.tasks.answers import evaluate

        return evaluate(self, model, split, rows, device, size)

    def example_batch(self, batch_size: int) -> dict[str, TensorSpec]:
        """Describe the largest batch there can be; a packed one has at most as many rows."""
        shape = (batch_size, self.settings.data.max_length)
        second = "position_ids" if self.settings.task.packing else "attention_mask"
        names = ("input_ids", second, "labels")
        return {name: TensorSpec(shape, torch.int64) for name in names}

    def _split(self, examples: Examples) -> Split:
        return LanguageSplit(examples, self.encoder, self.settings)

    def _example_inputs(self, batch_size: int) -> Mapping[str, TensorSpec]:
        return self.example_batch(batch_size)


class LanguageSplit(Split):
    """Passages, tokenized when first asked for."""

    def __init__(self, examples: Examples, encoder: Encoder, settings: RunSettings) -> None:
        super().__init__(examples)
        self._encoder, self._settings = encoder, settings
        self._kept: dict[int, Encoded] = {}

    def collate(self, indices: Indices) -> dict[str, Tensor]:
        """Build the batch of some examples: each of shape (rows, tokens), int64.

        Padded on the right, so that tokens keep their positions; packed, an example's positions
        start anew, by which the model tells it from its neighbours.
        """
        encoded = [self._encoded(int(index)) for index in indices]
        pad = int(self._encoder.tokenizer.pad_token_id)
        if self._settings.task.packing:
            return _packed(encoded, self._settings.data.max_length, pad)
        return _padded(encoded, pad)

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.collate(rows)

    def _encoded(self, row: int) -> Encoded:
        if row not in self._kept:
            passage = as_passage(self.examples.inputs[row], self._settings)
            self._kept[row] = self._encoder.example(passage)
        return self._kept[row]


def _padded(encoded: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    longest = max(len(one.tokens) for one in encoded)
    tokens = torch.full((len(encoded), longest), pad)
    labels = torch.full_like(tokens, IGNORED)
    mask = torch.zeros_like(tokens)
    for row, one in enumerate(encoded):
        count = len(one.tokens)
        tokens[row, :count] = torch.tensor(one.tokens)
        labels[row, :count] = _labels(one)
        mask[row, :count] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def _packed(encoded: Sequence[Encoded], width: int, pad: int) -> dict[str, Tensor]:
    """Fill rows with whole examples, longest first, each into the first row that has room."""
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for one in sorted(encoded, key=lambda one: -len(one.tokens)):
        count = len(one.tokens)
        place = next((i for i, left in enumerate(room) if left >= count), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(one)
        room[place] -= count
    longest = width - min(room)
    tokens = torch.full((len(rows), longest), pad)
    labels = torch.full_like(tokens, IGNORED)
    positions = torch.zeros_like(tokens)
    for row, members in enumerate(rows):
        start = 0
        for one in members:
            end = start + len(one.tokens)
            tokens[row, start:end] = torch.tensor(one.tokens)
            labels[row, start:end] = _labels(one)
            positions[row, start:end] = torch.arange(end - start)
            start = end
        positions[row, start:] = torch.arange(longest - start)  # padding: a member of its own
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def _labels(one: Encoded) -> Tensor:
    """Tokens that are learnt; the first has nothing before it to be told from."""
    labels = torch.tensor(one.tokens)  # (n,)
    labels[~torch.tensor(one.learnt)] = IGNORED
    labels[0] = IGNORED
    return labels
