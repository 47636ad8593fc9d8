"""Text classification: a tokenizer, padded per batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rankfit.tasks.data import Examples
from rankfit.tasks.models import load_config
from rankfit.tasks.sources import ModelError
from rankfit.tasks.task import Split, Task, TensorSpec
from rankfit.tasks.tokenizer import load_tokenizer

#: Models whose first positions are taken: position 0 of a text is number pad_token_id + 1.
_OFFSET_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class TextTask(Task):
    """Texts cut at ``data.max-length`` tokens and padded to the longest of their batch."""

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
        encoded = self._tokenizer(["a"])
        return {name: TensorSpec(shape, torch.int64) for name in encoded}


class TextSplit(Split):
    """Texts, tokenized batch by batch."""

    def __init__(self, examples: Examples, tokenizer: Any, max_length: int) -> None:
        super().__init__(examples)
        self._tokenizer = tokenizer
        self._max_length = max_length

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        encoded = self._tokenizer(
            [self._examples.inputs[row] for row in rows],
            padding="longest",
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        return dict(encoded)  # each (b, longest)


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for; None if its positions have no end."""
    values = config.to_dict()
    positions = values.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        return positions - int(values.get("pad_token_id") or 0) - 1
    return positions
