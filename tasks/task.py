"""What every task offers: the classes, the sets, batches, and how a result is scored."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankfit.configs.settings import RunSettings, split_list, split_names
from rankfit.tasks.config import number_classes, own_classes, places, read_config
from rankfit.tasks.data import DataError, Dataset, Encode, Examples, known_labels, read_data
from rankfit.tasks.metrics import DEFAULT, classification_metrics, regression_metrics
from rankfit.tasks.model_sources import source_fingerprint
from rankfit.tasks.packing import check_packing
from rankfit.tasks.records import EVERYTHING, Access

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

#: Indices of examples: a list, an array or a tensor on the CPU.
Indices = Sequence[int] | NDArray[np.int64] | Tensor


__all__ = ["Indices", "Split", "Task", "TensorSpec", "classification_metrics"]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor of a batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Split(ABC):
    """One set of examples, encoded when a batch is asked for."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every example, shape (n,)."""
        return self.examples.labels

    def collate(self, indices: Indices) -> dict[str, Tensor]:
        """Build the batch of some examples: what the model takes, and ``labels`` of shape (b,).

        Tensors lie on the CPU; inputs are float32 or int64 whatever the model's precision.
        """
        rows = [int(index) for index in indices]
        batch = self._encode(rows)
        targets = self.examples.targets
        labels = self.examples.labels if targets is None else targets
        batch["labels"] = torch.from_numpy(labels[rows])  # (b,)
        return batch

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of some examples; [] where they are no text."""
        return []

    def alike(self, rows: Sequence[int]) -> Sequence[int]:
        """The same examples in an order in which neighbours are of like size."""
        return rows

    @abstractmethod
    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Encode the inputs of some examples."""


@dataclass(frozen=True)
class Task(ABC):
    """What is learned, from which data; nothing is read before it is asked for.

    ``data_path`` is a node's own file or folder, in place of ``data.source``; ``access`` is what
    of the machine's data may be read and named.
    """

    settings: RunSettings
    data_path: str | None = None
    access: Access = EVERYTHING

    @cached_property
    def _data(self) -> Dataset:
        return read_data(
            self.settings,
            data_path=self.data_path,
            encode=self._encoding(),
            model=source_fingerprint(self.settings.model),
            access=self.access,
        )

    @cached_property
    def labels(self) -> int:
        """Number of the model's outputs; read from the data only where the settings do not say.

        Raises
        ------
        DataError
            If there is one class alone: transformers would take one output for a regression.
        """
        known = known_labels(self.settings)
        if known is None or (self._own_classes and self._sees_names):
            known = len(self.class_names)
        if known < 2 and self._classifies:
            raise DataError(
                f"data {self.data_path or self.settings.data.source}: there is one class alone, so "
                "nothing to tell apart; expected two or more (of pictures, a folder for each)",
                fault="data-classes",
            )
        return known

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their ids; see :func:`config.number_classes`."""
        if not self._classifies:
            return self._data.class_names
        return number_classes(self._data_names, self._own_classes, self.settings)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the model's outputs; () where there are none, or they are not known here."""
        return self.class_names if self._classifies and self._sees_names else ()

    @property
    def _classifies(self) -> bool:
        return self.settings.task.kind != "causal-lm" and (
            self.settings.task.problem == "classification"
        )

    @property
    def _sees_names(self) -> bool:
        """Whether the classes' names are known: a server whose nodes hold the data may not."""
        elsewhere = self.settings.partition.kind == "local" and self.data_path is None
        return not elsewhere or bool(split_names(self.settings.data.class_names))

    @property
    def _data_names(self) -> tuple[str, ...]:
        """Classes by the data's ids, from the settings where these name them."""
        names = split_names(self.settings.data.class_names)
        return names[: self.settings.data.classes or None] or self._data.class_names

    @cached_property
    def _own_classes(self) -> tuple[str, ...]:
        """Classes that the base model names."""
        return own_classes(read_config(self.settings.model)) if self._classifies else ()

    @cached_property
    def train(self) -> Split:
        """The training set."""
        return self._split(self._numbered(self._data.train))

    @cached_property
    def test(self) -> Split:
        """The test set; empty for a node's own files that hold none, unless clients evaluate."""
        return self._split(self._numbered(self._data.test))

    @cached_property
    def holdout(self) -> Split:
        """What the server holds back of the training set to choose the best round by."""
        return self._split(self._numbered(self._data.holdout))

    def _numbered(self, examples: Examples) -> Examples:
        """The same examples with the model's ids in place of the data's."""
        if not self._own_classes:
            return examples
        ids = places(self._data_names, self.class_names)
        assert ids is not None  # number_classes gave either these names or the model's
        return replace(examples, labels=np.array(ids, dtype=np.int64)[examples.labels])

    def example_batch(self, batch_size: int) -> dict[str, TensorSpec]:
        """Describe the largest batch there can be, for an estimate of its memory."""
        regression = self.settings.task.problem == "regression"
        labels = TensorSpec((batch_size,), torch.float32 if regression else torch.int64)
        return {**self._example_inputs(batch_size), "labels": labels}

    def evaluate(
        self, model: nn.Module, split: Split, rows: Sequence[int], device: torch.device, size: int
    ) -> dict[str, float]:
        """Measure a model on some examples of a split, ``size`` at a time.

        Where memory runs out, half as many are tried: the figures do not depend on the size.

        Raises
        ------
        torch.OutOfMemoryError
            If not even one example fits.
        """
        # Imported here: a check of the data should not wait for PEFT and transformers' models.
        from rankfit.tasks.lora import free_cache

        while True:
            try:
                return self._measure(model, split, rows, device, size)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise
                size = (size + 1) // 2
                log.warning("evaluation: %s; trying again with %d at a time", error, size)
            # The failed attempt's tensors hang on its traceback, which ends with the except clause.
            free_cache()

    def _measure(
        self, model: nn.Module, split: Split, rows: Sequence[int], device: torch.device, size: int
    ) -> dict[str, float]:
        """Figures of one attempt."""
        from rankfit.tasks.lora import chunks, predict

        batches = (split.collate(part) for part in chunks(split.alike(rows), size))
        return self.metrics(*predict(model, batches, device))

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Score predictions; see :mod:`rankfit.tasks.metrics`."""
        names = split_list(self.settings.task.metrics)
        if self.settings.task.problem == "regression":
            return regression_metrics(logits, labels, names or ("pearson", "spearman"))
        return classification_metrics(logits, labels, names or DEFAULT)

    def check_model(self, model: "PreTrainedModel") -> None:
        """Refuse a loaded base that cannot do what the task asks of it.

        Raises
        ------
        ModelError
            If it does not keep packed examples apart.
        """
        if self.settings.task.packing:
            check_packing(model, self.settings.data.max_length)

    @abstractmethod
    def _encoding(self) -> Encode:
        """What training does with inputs; raises where it would fail."""

    @abstractmethod
    def _split(self, examples: Examples) -> Split:
        """Wrap examples with this task's encoding."""

    @abstractmethod
    def _example_inputs(self, batch_size: int) -> Mapping[str, TensorSpec]:
        """Describe the inputs of the largest batch."""
