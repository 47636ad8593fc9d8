"""The papers' presets start on a local stand-in: the same settings, a tiny model and data."""

from pathlib import Path

import pytest

from rankfit.configs.compose import compose
from tests.server.federation import run
from tests.server.test_loop import lines

STAND_IN = (
    "model.source=builtin:font-vit", "data.source=sklearn:digits", "data.input-column=",
    "data.label-column=label", "task.kind=image-classification", "data.name=", "data.test=test",
    "lora.rank=8", "lora.alpha=8.0", "lora.targets=default", "run.rounds=1",
    "simulation.clients=3", "server.min-clients=3", "server.clients-per-round=3",
    "partition.min-samples=5", "train.steps=4",
)  # fmt: skip


@pytest.mark.parametrize(
    "parts",
    [
        ("cifar100-deit", "method.name=hralora", "partition.classes-per-client=5"),
        ("cifar100-deit", "clients-100", "method.name=fed-hello-fim", "partition.kind=iid"),
        ("glue-roberta",),
    ],
    ids=["hralora", "fed-hello", "fslora"],
)
def test_a_papers_preset_starts(parts: tuple[str, ...], tmp_path: Path) -> None:
    place = (f"run.directory={tmp_path}", "run.name=stand-in")
    folder = run(compose([*parts, *STAND_IN, *place]))
    line = lines(folder)[-1]
    assert line["updates"] == 3 and line["evaluation"]["accuracy"] > 0
