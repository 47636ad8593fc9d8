"""Importance scores on the server's own training split."""

import numpy as np

from rankfit.adapters.state import Adapter
from rankfit.configs.seeds import derive
from rankfit.configs.settings import RunSettings
from rankfit.server.evaluation import Evaluator
from rankfit.tasks.importance import fisher_scores
from rankfit.tasks.task import Task


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
        return fisher_scores(model, self._task.train, rows, self._evaluator.device)
