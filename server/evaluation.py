"""Evaluation of the global adapter on the server's test split, and importance scores there."""

from collections.abc import Sequence

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from rankfit.adapters.adapter import Adapter
from rankfit.configs.settings import RunSettings, derive
from rankfit.tasks.lora import (
    eject,
    fisher_scores,
    free_cache,
    inject,
    load_adapter,
    training_device,
)
from rankfit.tasks.task import Split, Task


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
        self._task, self._base, self._heads = task, base, heads
        self._batch_size = settings.server.evaluate_batch_size
        self.device = training_device()
        self._model: PeftModel | None = None
        self._ranks: dict[str, int] = {}
        self._movable = settings.model.quantization == "none"

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        """Metrics of a global adapter, of whatever ranks, on the whole test split."""
        return self.on(adapter, self._task.test)

    def on(
        self, adapter: Adapter, split: Split, rows: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Metrics of a global adapter on a split, or on some rows of it."""
        model = self.hold(adapter)
        rows = range(len(split)) if rows is None else rows
        try:
            return self._task.evaluate(model, split, rows, self.device, self._batch_size)
        finally:
            self.rest()

    def hold(self, adapter: Adapter) -> PeftModel:
        """The base with an adapter in it; made anew only when the ranks differ from the last."""
        if self._model is None or self._ranks != adapter.ranks:
            if self._model is not None:
                eject(self._model)
            model = inject(
                self._base, adapter.ranks, scale=adapter.scale, dropout=0.0, heads=self._heads
            )
            self._model, self._ranks = model, adapter.ranks
        self._model.to(self.device)
        load_adapter(self._model, adapter)
        return self._model

    def rest(self) -> None:
        """Leave a GPU to those who train on it, until the next evaluation."""
        if self._model is not None and self.device.type == "cuda" and self._movable:
            self._model.to("cpu")
            free_cache()


class Importance:
    """Measures Fisher scores of the global adapter on a probe set, drawn anew each time.

    The probe set comes from the training split: nothing is ever chosen on the test split.
    """

    def __init__(self, settings: RunSettings, task: Task, evaluator: Evaluator) -> None:
        self._settings = settings
        self._task = task
        self._evaluator = evaluator

    def __call__(self, adapter: Adapter, server_round: int) -> dict[str, float]:
        """Score of each module."""
        count = len(self._task.train)
        probe = min(self._settings.method.probe_samples or count, count)
        seed = derive(self._settings.run.seed, "probe", server_round)
        rows = np.random.default_rng(seed).choice(count, probe, replace=False)
        model = self._evaluator.hold(adapter)
        try:
            return fisher_scores(model, self._task.train, rows, self._evaluator.device)
        finally:
            self._evaluator.rest()
