"""Text classification: a tokenizer, padded per batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rankfit.configs.settings import split_list
from rankfit.tasks.data import Examples
from rankfit.tasks.models import load_config
from rankfit.tasks.sources import ModelError
from rankfit.tasks.task import Split, Task, TensorSpec
from rankfit.tasks.tokenizer import load_tokenizer, longest_text


@dataclass(frozen=True)
class TextTask(Task):
    """Texts, or pairs, cut at ``data.max-length`` tokens and padded to the longest of a batch."""

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.settings.model)
        config = load_config(self.settings.model, labels=2)
        limit, wanted = longest_text(config), self.settings.data.max_length
        if limit is not None and wanted > limit:
            raise ModelError(
                f"data.max-length {wanted}: {self.settings.model.source} takes at most {limit} "
                "tokens"
            )
        return tokenizer

    def _split(self, examples: Examples) -> Split:
        return TextSplit(examples, self._tokenizer, self.settings.data.max_length)

    def _example_inputs(self, batch_size: int) -> Mapping[str, TensorSpec]:
        shape = (batch_size, self.settings.data.max_length)
        pair = len(split_list(self.settings.data.input_column)) > 1
        encoded = self._tokenizer(["a"], ["a"]) if pair else self._tokenizer(["a"])
        return {name: TensorSpec(shape, torch.int64) for name in encoded}


class TextSplit(Split):
    """Texts, tokenized batch by batch."""

    def __init__(self, examples: Examples, tokenizer: Any, max_length: int) -> None:
        super().__init__(examples)
        self._tokenizer = tokenizer
        self._max_length = max_length

    def alike(self, rows: Sequence[int]) -> Sequence[int]:
        """Longest first: a batch is as long as its longest text, the rest of it is padding."""
        return sorted(rows, key=lambda row: -self._characters(row))

    def _characters(self, row: int) -> int:
        text = self.examples.inputs[row]
        return sum(map(len, text)) if isinstance(text, tuple) else len(text)

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        inputs = [self.examples.inputs[row] for row in rows]
        # A pair shares one sequence; the longer of the two is cut first.
        pairs = list(zip(*inputs, strict=True)) if isinstance(inputs[0], tuple) else [inputs]
        encoded = self._tokenizer(
            *(list(texts) for texts in pairs),
            padding="longest",
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        return dict(encoded)  # each (b, longest)
