"""What every task offers: the classes, the sets, batches, and how a result is scored."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankfit.configs.settings import RunSettings
from rankfit.tasks.data import Dataset, Examples, known_labels, read_data

#: Indices of examples: a list, an array or a tensor on the CPU.
Indices = Sequence[int] | NDArray[np.int64] | Tensor


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor of a batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Split(ABC):
    """One set of examples, encoded when a batch is asked for."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every example, shape (n,)."""
        return self._examples.labels

    def collate(self, indices: Indices) -> dict[str, Tensor]:
        """Build the batch of some examples: what the model takes, and ``labels`` of shape (b,).

        Tensors lie on the CPU; inputs are float32 or int64 whatever the model's precision.
        """
        rows = [int(index) for index in indices]
        batch = self._encode(rows)
        batch["labels"] = torch.from_numpy(self._examples.labels[rows])  # (b,)
        return batch

    @abstractmethod
    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Encode the inputs of some examples."""


@dataclass(frozen=True)
class Task(ABC):
    """A classification task; nothing is read before it is asked for.

    ``data_path`` is a node's own file or folder, in place of ``data.source``.
    """

    settings: RunSettings
    data_path: str | None = None

    @cached_property
    def _data(self) -> Dataset:
        return read_data(self.settings, data_path=self.data_path)

    @cached_property
    def labels(self) -> int:
        """Number of classes; read from the data only where the settings leave it open."""
        return known_labels(self.settings) or len(self._data.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their ids."""
        return self._data.class_names

    @cached_property
    def train(self) -> Split:
        """The training set."""
        return self._split(self._data.train)

    @cached_property
    def test(self) -> Split:
        """The test set; empty for a node's own files that hold none, unless clients evaluate."""
        return self._split(self._data.test)

    def example_batch(self, batch_size: int) -> dict[str, TensorSpec]:
        """Describe the largest batch there can be, for an estimate of its memory."""
        return {
            **self._example_inputs(batch_size),
            "labels": TensorSpec((batch_size,), torch.int64),
        }

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Score predictions; see :func:`classification_metrics`."""
        return classification_metrics(logits, labels)

    @abstractmethod
    def _split(self, examples: Examples) -> Split:
        """Wrap examples with this task's encoding."""

    @abstractmethod
    def _example_inputs(self, batch_size: int) -> Mapping[str, TensorSpec]:
        """Describe the inputs of the largest batch."""


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1, micro F1 and mean cross entropy.

    Macro F1 is the mean over the classes that occur among labels or predictions; a class that is
    never predicted counts 0.

    Parameters
    ----------
    logits
        Shape (n, classes).
    labels
        Shape (n,), int64.

    Raises
    ------
    ValueError
        If there is no example, or the shapes do not fit.
    """
    from sklearn.metrics import f1_score

    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (n, classes) "
            "and (n,) with n above 0"
        )
    logits, labels = logits.detach().float().cpu(), labels.cpu()
    predicted = logits.argmax(dim=1)  # (n,)
    scores: Any = {
        f"{average}-f1": f1_score(
            labels.numpy(), predicted.numpy(), average=average, zero_division=0.0
        )
        for average in ("macro", "micro")
    }
    return {
        "accuracy": float((predicted == labels).double().mean()),
        **{name: float(score) for name, score in scores.items()},
        "loss": float(torch.nn.functional.cross_entropy(logits, labels)),
    }
