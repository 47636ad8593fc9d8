"""Evaluation of the global adapter on the server's test split."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rankfit.adapters.state import Adapter
from rankfit.configs.settings import RunSettings
from rankfit.tasks.adapted import chunks, load_adapter, predict
from rankfit.tasks.models import inject, target_modules
from rankfit.tasks.task import Task


class Evaluator:
    """Holds the base with an adapter of the global rank, and measures any global adapter on it.

    Parameters
    ----------
    settings : RunSettings
        The run.
    task : Task
        Its test split is evaluated on.
    base : PreTrainedModel
        Taken over: the adapter is put into it.
    heads : Sequence[str]
        Modules that are trained whole.
    """

    def __init__(
        self, settings: RunSettings, task: Task, base: PreTrainedModel, heads: Sequence[str]
    ) -> None:
        self._task = task
        self._batch_size = settings.server.evaluate_batch_size
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if settings.server.evaluate != "server":
            return
        ranks = dict.fromkeys(target_modules(base, settings.lora.targets), settings.lora.rank)
        model = inject(base, ranks, scale=settings.lora.scale, dropout=0.0, heads=heads)
        self._model = model.to(self._device)

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        """Metrics of the global adapter on the whole test split."""
        load_adapter(self._model, adapter)
        everything = range(len(self._task.test))
        batches = (self._task.test.collate(i) for i in chunks(everything, self._batch_size))
        logits, labels = predict(self._model, batches, self._device)
        return self._task.metrics(logits, labels)
