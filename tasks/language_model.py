"""Causal language models: examples as tokens, padded or packed, and what an evaluation gives."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rankfit.configs.settings import RunSettings, split_names
from rankfit.tasks import prompts
from rankfit.tasks.config import longest_text, read_config
from rankfit.tasks.data import Encode, Examples
from rankfit.tasks.packing import Encoded, packed, padded
from rankfit.tasks.prompts import (
    Passage,
    as_passage,
    is_chat,
    prompt_of,
    question,
    render_prompt,
    segments,
)
from rankfit.tasks.records import DataError, Reading
from rankfit.tasks.task import Indices, Split, Task, TensorSpec
from rankfit.tasks.tokenizer import check_text, load_tokenizer

log = logging.getLogger(__name__)

#: Tokens of a split that are stored; of a set larger than memory the rest is tokenized anew.
_STORED_TOKENS = 2**23


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
        first = tokenizer("a")["input_ids"][:1]
        self._first = first if first == [tokenizer.bos_token_id] else []
        self._last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._warned = False

    def example(self, passage: Passage) -> Encoded:
        """Encode a passage; one that is too long loses the start of its prompt, not its answer."""
        everything = self._settings.task.loss == "all"
        opens, closes = self._ends(passage)
        tokens: list[int] = []
        target: list[bool] = []
        last: list[int] = []
        for part in segments(passage, self._settings, self.tokenizer):
            last = self._ids(part.text)
            tokens += last
            target += [part.target or everything] * len(last)
        # A text that was written with the tokens that open and close it has them once.
        if opens and tokens[:1] == opens:
            tokens, target = tokens[1:], target[1:]
        if closes and tokens[-1:] == closes:
            tokens, target, last = tokens[:-1], target[:-1], last[:-1]
        tokens += closes
        target += [True] * len(closes)
        room = self._settings.data.max_length - len(opens)
        if len(tokens) > room:
            self._warn(len(tokens) + len(opens))
            answer = len(last) + len(closes)
            kept = slice(-room, None) if answer <= room else slice(-answer, room - answer or None)
            tokens, target = tokens[kept], target[kept]
        return Encoded((*opens, *tokens), (*(False for _ in opens), *target))

    def prompt(self, passage: Passage, room: int) -> list[int]:
        """Encode what stands before the last answer; its start goes where it is longer."""
        parts = segments(passage, self._settings, self.tokenizer)
        return self._cut([i for part in parts[:-1] for i in self._ids(part.text)], passage, room)

    def question(self, text: str, form: str, room: int) -> list[int]:
        """Encode a prompt of a user's, written as the run's examples of a form are."""
        asked = question(text, form)
        return self._cut(
            self._ids(render_prompt(asked, self._settings, self.tokenizer)), asked, room
        )

    def text(self, passage: Passage) -> str:
        """What stands before the last answer, as text."""
        return prompt_of(segments(passage, self._settings, self.tokenizer))

    def answer(self, text: str) -> list[int]:
        """Encode an answer alone."""
        return self._ids(text)

    def _ends(self, passage: Passage) -> tuple[list[int], list[int]]:
        """Tokens that open and close a passage; chat templates write them themselves."""
        chat = is_chat(passage, self._settings)
        return ([], []) if chat else (self._first, self._last)

    def _cut(self, tokens: list[int], passage: Passage, room: int) -> list[int]:
        opens, _ = self._ends(passage)
        if opens and tokens[:1] == opens:
            tokens = tokens[1:]
        return [*opens, *tokens[-max(1, room - len(opens)) :]]

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
        check_text(self.settings, tokenizer)
        return Encoder(tokenizer, self.settings)

    @cached_property
    def longest(self) -> int | None:
        """Tokens that the model has positions for (None = no end)."""
        return longest_text(read_config(self.settings.model))

    @property
    def room(self) -> int:
        """Tokens that a prompt of an evaluation may have."""
        room = self.settings.data.max_length
        if self.longest is not None:
            room = min(room, self.longest - self.settings.task.max_new_tokens)
        return room

    def passages(self, split: Split, rows: Sequence[int]) -> list[Passage]:
        """Records of a split."""
        examples = split.examples
        return [as_passage(examples.inputs[row], self.settings, examples.reading) for row in rows]

    @property
    def form(self) -> str:
        """What the run's records are: ``data.format``, or what it was found to be."""
        if self.settings.data.format != "auto":
            return self.settings.data.format
        reading = self._data.train.reading
        return "instruction" if reading is None else reading.form

    def _measure(
        self, model: nn.Module, split: Split, rows: Sequence[int], device: torch.device, size: int
    ) -> dict[str, float]:
        """Loss of the answers, and how many are right; see :mod:`rankfit.tasks.generation`."""
        from rankfit.tasks.generation import evaluate

        return evaluate(self, model, split, rows, device, size)

    def example_batch(self, batch_size: int) -> dict[str, TensorSpec]:
        """Describe the largest batch there can be; a packed one has at most as many rows."""
        shape = (batch_size, self.settings.data.max_length)
        second = "position_ids" if self.settings.task.packing else "attention_mask"
        names = ("input_ids", second, "labels")
        return {name: TensorSpec(shape, torch.int64) for name in names}

    def _encoding(self) -> Encode:
        """See the base class; a record without a target is refused."""
        encoder = self.encoder

        def tokens(inputs: Sequence[Any], reading: Reading | None) -> None:
            for record in inputs:
                encoded = encoder.example(as_passage(record, self.settings, reading))
                if not any(encoded.target[1:]):
                    raise DataError("has no token to learn; expected a longer text")

        return tokens

    @property
    def tells_groups(self) -> bool:
        """Whether figures may be named by the groups: those that the run itself knows always."""
        known = {*split_names(self.settings.data.class_names), *prompts.NAMES}
        return self.access.label_names or known.issuperset(self.class_names)

    def _split(self, examples: Examples) -> Split:
        return LanguageSplit(examples, self.encoder, self.settings)

    def _example_inputs(self, batch_size: int) -> Mapping[str, TensorSpec]:
        return self.example_batch(batch_size)


class LanguageSplit(Split):
    """Passages, tokenized when first asked for, and stored while there are not too many."""

    def __init__(self, examples: Examples, encoder: Encoder, settings: RunSettings) -> None:
        super().__init__(examples)
        self._encoder, self._settings = encoder, settings
        self._kept: dict[int, Encoded] = {}
        self._room = _STORED_TOKENS

    def collate(self, indices: Indices) -> dict[str, Tensor]:
        """Build the batch of some examples: each of shape (rows, tokens), int64.

        Padded on the right, so that tokens keep their positions; packed, an example's positions
        start anew, by which the model tells it from its neighbours.
        """
        encoded = [self._encoded(int(index)) for index in indices]
        pad = int(self._encoder.tokenizer.pad_token_id)
        if self._settings.task.packing:
            return packed(encoded, self._settings.data.max_length, pad)
        return padded(encoded, pad)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """See the base class."""
        return [len(self._encoded(int(row)).tokens) for row in rows]

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.collate(rows)

    def _encoded(self, row: int) -> Encoded:
        known = self._kept.get(row)
        if known is not None:
            return known
        record, reading = self.examples.inputs[row], self.examples.reading
        encoded = self._encoder.example(as_passage(record, self._settings, reading))
        if self._room >= len(encoded.tokens):
            self._room -= len(encoded.tokens)
            self._kept[row] = encoded
        return encoded
