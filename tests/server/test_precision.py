"""Fleets whose devices keep the frozen base in different precisions, as their plans say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankfit.client import trainer
from rankfit.configs.settings import ConfigError, from_flat
from rankfit.estimator.plan_search import Estimator, inputs_of, steps
from rankfit.tasks import load_task
from rankfit.tasks.base_model import ModelError, load_config
from tests.estimator.small import device
from tests.server.federation import run, settings_for

MIB = 2**20
TWO = (
    "simulation.clients=2",
    "server.clients-per-round=2",
    "server.min-clients=2",
    "run.rounds=2",
    "train.steps=3",
    "plan.search=",
    "plan.precisions=bf16",
    "server.evaluate=clients",
)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_smaller_device_trains_on_a_bf16_base_within_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, "probe", *TWO)
    task = load_task(settings)
    estimator = Estimator.for_run(
        settings,
        load_config(settings.model, labels=task.labels),
        inputs_of(task.example_batch(1)),
    )
    whole, lowered = estimator.needs(device(1)).values()
    assert lowered < 0.7 * whole
    small = (lowered + whole) / 2 / MIB
    seen: dict[str, set[torch.dtype]] = {}
    attempt = trainer._attempt

    def noted(workspace: Any, job: trainer.Job, plan: Any) -> Any:
        base = workspace.base_at(plan.precision)
        seen[job.client] = {parameter.dtype for parameter in base.parameters()}
        return attempt(workspace, job, plan)

    monkeypatch.setattr(trainer, "_attempt", noted)
    folder = run(settings_for(tmp_path, "two", *TWO, f'fleet.memory-mib="{small},64"'))
    plans = {line["client"]: line["plan"] for line in lines(folder, "plans.jsonl")}
    assert plans["partition-0"]["precision"] == "bf16"
    assert plans["partition-1"]["precision"] == "fp32"
    assert seen == {"partition-0": {torch.bfloat16}, "partition-1": {torch.float32}}
    rounds = lines(folder, "rounds.jsonl")[1:]
    for line in rounds:
        own, other = line["clients"]["partition-0"], line["clients"]["partition-1"]
        assert own["merged"] and other["merged"]
        assert "out-of-memory" not in own, "planned for, not run into"
        assert own["peak-memory-bytes"] == plans["partition-0"]["peak-bytes"]
        assert own["peak-memory-bytes"] <= small * MIB < other["peak-memory-bytes"]
        assert 0 < own["train-loss"] < 10 and line["evaluation"]["loss"] > 0


def test_a_base_without_weights_to_read_is_not_planned_in_4_bits(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "none", *TWO, "plan.precisions=bf16,nf4")
    with pytest.raises(ModelError, match="'builtin:font-vit' is not a folder or hub id"):
        run(settings)


def test_precisions_are_searched_last_and_only_downwards() -> None:
    settings = from_flat(
        {"model.precision": "bf16", "plan.precisions": "fp32,bf16,nf4", "train.batch-size": 2}
    )
    listed = steps(settings, can_checkpoint=True)
    assert [str(step) for step in listed] == [
        f"{batch}, {base} base"
        for base in ("bf16", "nf4")
        for batch in (
            "micro-batch 2",
            "micro-batch 1",
            "micro-batch 2 with checkpointing",
            "micro-batch 1 with checkpointing",
        )
    ]


def test_what_cannot_be_lowered_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"plan.precisions: unknown precision 'fp12'"):
        from_flat({"plan.precisions": "fp12"})
    with pytest.raises(ConfigError, match="is not lowered further"):
        from_flat({"plan.precisions": "nf4", "model.quantization": "int8"})
