"""Methods and drift controls in whole runs: what travels, what is measured, what a resume keeps."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel

from rankfit.client import trainer
from rankfit.configs.settings import ConfigError
from rankfit.server.export import export
from rankfit.server.run_directory import SavedRun
from rankfit.tasks import load_task
from rankfit.tasks.base_model import load_base
from rankfit.tasks.lora import TRAINED, inject, predict
from tests.server.federation import run, settings_for
from tests.server.test_loop import figures, lines

SMALL = (
    "run.rounds=2",
    "simulation.clients=3",
    "server.min-clients=3",
    "server.clients-per-round=2",
)
EVERYTHING = (
    "method.name=hralora", "method.warm-up-rounds=1", "method.renew-every=1",
    "method.scores=clients", "method.probe-samples=6", "server.optimizer=adam",
    "server.learning-rate=0.05", "server.average=0.7", "server.sampling=samples",
    "train.proximal=0.01", "train.label-prior=1.0", "train.schedule=cosine",
)  # fmt: skip
PRUNING = (
    "method.name=hetlora", "method.prune-weight=0.3", "server.optimizer=momentum",
    "server.learning-rate=0.5", "method.scores=server",
)  # fmt: skip
FOLDING = ("method.name=flora", "plan.download-seconds=0.0", "server.average=0.6")


class Killed(BaseException):
    """The server dies."""


def die_in_round_two(message: Message, reply: Message) -> Message:
    if message.metadata.group_id == "2":
        raise Killed
    return reply


@pytest.mark.parametrize("case", [EVERYTHING, PRUNING, FOLDING], ids=["all", "pruning", "folding"])
def test_all_state_survives_a_stop(case: tuple[str, ...], tmp_path: Path) -> None:
    whole = run(settings_for(tmp_path, "whole", *SMALL, *case))
    with pytest.raises(Killed):
        run(
            settings_for(tmp_path, "cut", *SMALL, *case),
            dict.fromkeys(range(3), die_in_round_two),
        )
    resumed = run(settings_for(tmp_path, "cut", *SMALL, *case, "run.resume=true"))
    assert figures(resumed) == figures(whole)
    line = lines(whole)[-1]
    assert line["evaluation"]["accuracy"] > 0.2
    assert set(line["diagnostics"]) >= {"truncation-error", "mean-error", "effective-rank"}
    assert not any(k.startswith("score") for c in line["clients"].values() for k in c)


def test_an_export_with_folded_parts_is_what_was_evaluated(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "fold", *SMALL, "run.rounds=2", *FOLDING[:2])
    folder = run(settings)
    task = load_task(settings)
    model = PeftModel.from_pretrained(load_base(settings, task.labels), str(folder / "checkpoint"))
    logits, labels = predict(model, [task.test.collate(range(len(task.test)))], torch.device("cpu"))
    last = lines(folder)[-1]
    assert task.metrics(logits, labels)["accuracy"] == pytest.approx(last["evaluation"]["accuracy"])
    assert last["diagnostics"]["mean-error"] < 1e-5, "FLoRA folds the exact mean"


def by_rank(folder: Path, number: int = 1) -> dict[int, dict[str, Any]]:
    return {client["rank"]: client for client in lines(folder)[number]["clients"].values()}


def test_a_sketch_trains_sends_and_holds_its_own_rank_only(tmp_path: Path) -> None:
    folder = run(settings_for(tmp_path, "sketch", "method.name=fslora", "run.rounds=1"))
    clients = by_rank(folder)
    head, unit = 64 * 10 + 10, 8 * (64 + 64)
    assert set(clients) == {1, 2, 8}
    for rank, client in clients.items():
        assert client["parameters"] == head + unit * rank
        assert client["upload-bytes"] == client["download-bytes"] == 4 * (head + unit * rank)
    assert clients[2]["peak-memory-bytes"] < clients[8]["peak-memory-bytes"]


@pytest.mark.parametrize("method", ["hralora", "rankfit", "fslora"])
def test_a_rank_is_true_in_shapes_bytes_and_measured_memory(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HRALoRA's published code masks gradients: nothing of it differs at rank 1, 24 and 48."""
    shapes: list[set[tuple[int, ...]]] = []

    def watched(*args: Any, **options: Any) -> PeftModel:
        model = inject(*args, **options)
        own = {n: p for n, p in model.named_parameters() if f".{TRAINED}." in n and "lora_" in n}
        assert all(p.requires_grad for p in own.values())
        shapes.append({tuple(p.shape) for p in own.values()})
        return model

    monkeypatch.setattr(trainer, "inject", watched)
    own = (
        f"method.name={method}", "run.rounds=1", "train.steps=2", "fleet.memory-mib=64",
        'fleet.upload-mbps="3, 5, 8, 20"', "fleet.download-mbps=200",
    )  # fmt: skip
    folder = run(settings_for(tmp_path, "true", *own))
    clients = lines(folder)[1]["clients"]
    ranks = [client["rank"] for client in clients.values()]
    assert ranks == [1, 2, 4, 8]
    assert shapes == [{(rank, 64), (64, rank)} for rank in ranks]
    for key in ("parameters", "upload-bytes", "peak-memory-bytes"):
        figures = [client[key] for client in clients.values()]
        assert all(less < more for less, more in pairwise(figures)), (key, figures)


def test_kronecker_factors_travel_and_train_as_small_as_they_are(tmp_path: Path) -> None:
    """LoKr: W₁ (8 × 8) whole and B·A (8 × 8) at one rank, in each of eight modules."""
    own = ("lokr", "run.rounds=2", "fleet.memory-mib=64", 'fleet.upload-mbps="3.6, 20"')
    folder = run(settings_for(tmp_path, "lokr", *own))
    head, outer, unit = 64 * 10 + 10, 8 * 8 * 8, 8 * (8 + 8)
    expected = {p["client"]: p["plan"]["peak-bytes"] for p in lines(folder, "plans.jsonl")}
    for name, client in lines(folder)[1]["clients"].items():
        assert client["parameters"] == head + outer + unit * client["rank"]
        assert client["upload-bytes"] == client["download-bytes"] == 4 * client["parameters"]
        assert abs(client["peak-memory-bytes"] - expected[name]) <= 4096
    written = export(SavedRun.open(folder), tmp_path / "adapter", merged=False)
    settings = settings_for(tmp_path, "plain")
    task = load_task(settings)
    model = PeftModel.from_pretrained(load_base(settings, task.labels), str(written))
    logits, labels = predict(model, [task.test.collate(range(len(task.test)))], torch.device("cpu"))
    final = lines(folder)[-1]["evaluation"]["accuracy"]
    assert task.metrics(logits, labels)["accuracy"] == pytest.approx(final, abs=0.003)


def test_layers_that_are_left_out_are_not_sent(tmp_path: Path) -> None:
    folder = run(settings_for(tmp_path, "layers", "method.name=legend", "run.rounds=1"))
    clients = by_rank(folder)
    head = 4 * (64 * 10 + 10)
    assert clients[4]["upload-bytes"] - head == 2 * 4 * 4 * 128, (
        "rank 4 in q and v of the top layer"
    )
    assert clients[8]["upload-bytes"] > clients[4]["upload-bytes"]


def test_the_learning_rate_follows_its_schedule(tmp_path: Path) -> None:
    steps = ("train.schedule=step", "train.schedule-step=1", "train.schedule-factor=0.5")
    folder = run(
        settings_for(tmp_path, "rate", *SMALL, *steps, "run.rounds=2", "train.learning-rate=3e-3")
    )
    found = [next(iter(line["clients"].values()))["learning-rate"] for line in lines(folder)[1:]]
    assert found == pytest.approx([3e-3, 1.5e-3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method.name=exclusive", "fleet.memory-mib=\"4\"", "fleet.upload-mbps=\"3\""),
         "no client can train lora.rank 8, the largest is 1"),
        (("method.name=hralora", "fleet.upload-mbps=0.5"),
         "no device can train even plan.min-rank: partition-0 rank 1 is 6696 bytes to upload"),
        (("method.name=lokr",), "lokr is for lora.form 'kronecker', not 'lora'"),
        (("method.name=flora",), "flora folds what it learns into the base"),
        (("method.name=flora", "server.optimizer=adam"), "server.optimizer 'adam' cannot be used"),
        (("method.name=fslora", "method.remainder=true"), "method.remainder cannot be used"),
        (("method.name=fedit", "method.without=fisher"), "fedit has no part 'fisher'"),
        (("partition.kind=pathological", "partition.classes-per-client=11"), "only 10 classes"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_do_is_one_clear_error_before_training(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError if "classes" not in message else ValueError, match=message):
        run(settings_for(tmp_path, "bad", *overrides))
    assert not (tmp_path / "bad").exists()
