"""Experiment trackers: each round's figures for TensorBoard, W&B, MLflow and Trackio.

Accelerate's trackers speak to the libraries. None of them may cost a run: what a tracker raises is
one warning, and the run goes on without it.
"""

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from accelerate import PartialState
from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from rankfit.configs.compose import without_places
from rankfit.configs.protocol import Metric
from rankfit.configs.settings import RunSettings, split_list, to_flat
from rankfit.tasks.lora import training_device

log = logging.getLogger(__name__)

#: Project, or experiment, that all runs belong to.
PROJECT = "rankfit"
#: Figures of a round beside those of its groups.
_OF_ROUND = (
    Metric.TRAIN_LOSS,
    "updates",
    "dropped",
    "upload-bytes",
    "download-bytes",
    "seconds",
)
_GROUPS = ("evaluation", "holdout", "diagnostics")


class Trackers:
    """The trackers of ``run.report-to``, from the first round to the last.

    Parameters
    ----------
    settings : RunSettings
        The run; stored as hyperparameters, without local paths.
    folder : Path
        The run directory.
    identity : str
        Of the run: a resumed run goes on under the same name.
    first : int
        First round that is played now; what a tracker has of it and of later ones is replaced where
        the tracker can do that.
    """

    def __init__(self, settings: RunSettings, folder: Path, identity: str, first: int) -> None:
        self._trackers: dict[str, GeneralTracker] = {}
        for name in split_list(settings.run.report_to):
            self._try(name, partial(self._start, name, settings, folder, identity, first))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand a round's line of ``rounds.jsonl`` to all."""
        values, number = figures(line), int(line["round"])
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, values, step=number))

    def _start(
        self, name: str, settings: RunSettings, folder: Path, identity: str, first: int
    ) -> None:
        # The trackers' own log asks for it. On the device that is trained on: clients of the same
        # process share it.
        PartialState(cpu=training_device().type == "cpu")
        tracker = _STARTS[name](settings, folder, identity, first)
        tracker.start()
        if first == 1 or name != "tensorboard":  # TensorBoard would show them as one more run
            tracker.store_init_configuration(to_flat(without_places(settings)))
        self._trackers[name] = tracker

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except ModuleNotFoundError as error:
            self._give_up(name, f"{error}; pip install 'rankfit[{name}]'")
        except Exception as error:  # noqa: BLE001 - whatever a library raises
            self._give_up(name, f"{type(error).__name__}: {error}")

    def _give_up(self, name: str, reason: str) -> None:
        self._trackers.pop(name, None)
        log.warning("tracker %s: %s. The run goes on without it", name, " ".join(reason.split()))


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a round under names with slashes: of the round, and of each client."""
    found = {f"round/{key}": line[key] for key in _OF_ROUND if key in line}
    found |= {"round/best": line["best"]} if "best" in line else {}
    for group in _GROUPS:
        found |= {f"{group}/{key}": value for key, value in line.get(group, {}).items()}
    for client, own in line.get("clients", {}).items():
        for key, value in own.items():
            if isinstance(value, int | float):
                found[f"client/{client}/{key}"] = value
    return {name: float(value) for name, value in found.items()}


def _tensorboard(settings: RunSettings, folder: Path, identity: str, first: int) -> GeneralTracker:
    return TensorBoardTracker("events", folder, purge_step=first)


def _wandb(settings: RunSettings, folder: Path, identity: str, first: int) -> GeneralTracker:
    # The run's console is the log that RankFit writes: W&B would take hold of Flower's.
    return WandBTracker(
        PROJECT,
        name=settings.run.name,
        id=identity or None,
        resume="allow",
        dir=folder,
        settings={"console": "off", "silent": True},
    )


def _mlflow(settings: RunSettings, folder: Path, identity: str, first: int) -> GeneralTracker:
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        # MLflow's own default is the working directory, which Flower deletes.
        mlflow.set_tracking_uri(f"sqlite:///{folder.parent / 'mlflow.db'}")
    artifacts = (folder.parent / "mlartifacts").as_uri()
    return MLflowTracker(
        PROJECT, artifacts, run_name=settings.run.name, tags={"rankfit.identity": identity}
    )


def _trackio(settings: RunSettings, folder: Path, identity: str, first: int) -> GeneralTracker:
    return TrackioTracker(
        PROJECT, name=f"{settings.run.name}-{identity[:6]}", resume="allow", embed=False,
        auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip


_STARTS: Mapping[str, Callable[[RunSettings, Path, str, int], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
