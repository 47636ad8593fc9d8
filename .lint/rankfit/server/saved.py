"""A run as it lies on disk: its settings, and the adapter of any checkpoint that is kept."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedModel

from rankfit.adapters.state import Adapter
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.server.evaluation import Evaluator
from rankfit.server.rundir import STATE, WEIGHTS
from rankfit.tasks.catalogue import load_task
from rankfit.tasks.models import load_base, shared_heads
from rankfit.tasks.task import Task


@dataclass(frozen=True)
class SavedRun:
    """A run that was trained.

    Attributes
    ----------
    path : Path
        The run directory.
    settings : RunSettings
        As it ran, with what the caller changed.
    round : int
        Of the checkpoint.
    adapter : Adapter
        What the checkpoint holds for use: the exported adapter.
    identity : str
        Of the run (empty before its first round, and in runs of older releases).
    """

    path: Path
    settings: RunSettings
    round: int
    adapter: Adapter
    identity: str

    @classmethod
    def open(
        cls, directory: Path, number: int | None = None, overrides: Sequence[str] = ()
    ) -> "SavedRun":
        """Read a run.

        Parameters
        ----------
        number : int, optional
            Round of the checkpoint (None = the newest).
        overrides : sequence of str
            ``table.key=value`` over the run's settings.

        Raises
        ------
        ConfigError
            If there is no run or no such checkpoint.
        """
        path = Path(directory).expanduser().resolve()
        if not (path / "config.toml").is_file():
            raise ConfigError(f"{path} holds no run: there is no config.toml in it")
        place = [f"run.directory={path.parent}", f"run.name={path.name}"]
        settings = compose([str(path / "config.toml"), *place, *overrides])
        folder = path / "checkpoint"
        if number is not None:
            folder = path / "checkpoints" / f"round-{number:05d}"
        if not (folder / STATE).is_file():
            kept = sorted(item.name for item in (path / "checkpoints").glob("round-*"))
            raise ConfigError(
                f"{path} has no checkpoint of round {number}; there are: "
                f"{', '.join(kept) or 'none'}"
            )
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        adapter = Adapter.from_state_dict(load_file(folder / WEIGHTS), state["scale"])
        identity = state["strategy"].get("identity", "")
        return cls(path, settings, state["round"], adapter, identity)

    @cached_property
    def task(self) -> Task:
        """The run's task."""
        return load_task(self.settings)

    @cached_property
    def base(self) -> PreTrainedModel:
        """The run's base model."""
        return load_base(self.settings, self.task.labels)

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Modules that were trained whole and are part of the adapter."""
        return shared_heads(self.base, self.settings.head)

    def evaluator(self) -> Evaluator:
        """Measures adapters on the run's task; takes over the base."""
        return Evaluator(self.settings, self.task, self.base, self.heads)

    def lines(self) -> list[dict[str, Any]]:
        """Lines of ``rounds.jsonl`` up to the checkpoint."""
        file = self.path / "rounds.jsonl"
        texts = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        lines = [json.loads(text) for text in texts]
        return [line for line in lines if line["round"] <= self.round]
