"""The run loop with the real ServerApp side, Strategy, ClientApp and trainer."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from peft import PeftModel

from rankfit.client import trainer
from rankfit.configs.settings import ConfigError
from rankfit.estimator.round_time import Payload
from rankfit.server.loop import RunFailed
from rankfit.server.run_directory import RunDirectory
from rankfit.strategies import fleet
from rankfit.strategies.methods import find, methods
from rankfit.tasks import load_task
from rankfit.tasks.base_model import head_modules, load_base, target_modules
from rankfit.tasks.lora import predict
from tests.server.federation import Clock, Fault, FaultyGrid, run, settings_for

VOLATILE = ("seconds", "train-seconds", "peak-memory-bytes")


def lines(folder: Path, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def figures(folder: Path) -> list[dict[str, Any]]:
    """Rounds without what may differ between two runs of one seed."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in VOLATILE}
        return value

    return [strip(line) for line in lines(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds that nothing disturbs."""
    return run(settings_for(tmp_path_factory.mktemp("runs"), "plain"))


def test_a_run_learns_at_ranks_that_differ_and_writes_its_directory(plain: Path) -> None:
    rounds = lines(plain)
    assert [line["round"] for line in rounds] == [0, 1, 2, 3]
    accuracy = [line["evaluation"]["accuracy"] for line in rounds]
    assert accuracy[-1] > accuracy[0] + 0.2
    assert {c["rank"] for line in rounds[1:] for c in line["clients"].values()} == {1, 2, 8}
    plans = lines(plain, "plans.jsonl")
    assert {p["plan"]["binding"] for p in plans} == {"upload", "memory", "cap"}
    for name in ("config.toml", "report.html", "checkpoint/adapter_model.safetensors"):
        assert (plain / name).stat().st_size > 0
    assert list((plain / "events").glob("events.out.tfevents.*"))


def test_what_travels_and_what_is_measured_follows_the_rank(plain: Path) -> None:
    """HRALoRA's published code: memory and bytes are the same at rank 1, 24 and 48."""
    clients = lines(plain)[1]["clients"].values()
    by_rank = {client["rank"]: client for client in clients}
    head, unit = 4 * (64 * 10 + 10), 4 * 8 * (64 + 64)
    for rank, client in by_rank.items():
        assert client["upload-bytes"] == client["download-bytes"] == head + unit * rank
    assert by_rank[2]["peak-memory-bytes"] < by_rank[8]["peak-memory-bytes"]


def test_the_measured_peak_is_the_expected_one(plain: Path) -> None:
    expected = {p["client"]: p["plan"]["peak-bytes"] for p in lines(plain, "plans.jsonl")}
    for name, client in lines(plain)[1]["clients"].items():
        assert abs(client["peak-memory-bytes"] - expected[name]) <= 1024


def test_two_runs_of_one_seed_agree(plain: Path, tmp_path: Path) -> None:
    assert figures(run(settings_for(tmp_path, "again"))) == figures(plain)


def test_another_seed_gives_other_figures(plain: Path, tmp_path: Path) -> None:
    assert figures(run(settings_for(tmp_path, "other", "run.seed=1"))) != figures(plain)


def test_a_run_that_dies_in_a_round_resumes_with_the_same_figures(
    plain: Path, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def die(message: Message, reply: Message) -> Message:
        if message.metadata.group_id == "2":
            raise Killed
        return reply

    with pytest.raises(Killed):
        run(settings_for(tmp_path, "cut"), {2: die})
    assert [line["round"] for line in lines(tmp_path / "cut")] == [0, 1]
    resumed = run(settings_for(tmp_path, "cut", "run.resume=true"))
    assert figures(resumed) == figures(plain)


def test_a_line_written_after_the_last_checkpoint_is_dropped_on_resume(
    plain: Path, tmp_path: Path
) -> None:
    folder = run(settings_for(tmp_path, "cut", "run.rounds=2"))
    with (folder / "rounds.jsonl").open("a") as out:
        out.write('{"round": 3, "half": tr')
    assert figures(run(settings_for(tmp_path, "cut", "run.resume=true"))) == figures(plain)


def test_peft_loads_the_checkpoint_with_the_same_accuracy(plain: Path) -> None:
    settings = settings_for(plain.parent, "plain")
    task = load_task(settings)
    model = PeftModel.from_pretrained(load_base(settings, task.labels), str(plain / "checkpoint"))
    logits, labels = predict(model, [task.test.collate(range(len(task.test)))], torch.device("cpu"))
    assert task.metrics(logits, labels)["accuracy"] == pytest.approx(
        lines(plain)[-1]["evaluation"]["accuracy"]
    )


def raises(message: Message, reply: Message) -> Message:
    raise RuntimeError("the disk of this client is full")


def silent(message: Message, reply: Message) -> None:
    return None


def edited(change: Any) -> Fault:
    """Change the arrays of an update."""

    def fault(message: Message, reply: Message) -> Message:
        record = reply.content.array_records["adapter"]
        arrays = {name: array.numpy().copy() for name, array in record.items()}
        change(arrays)
        reply.content["adapter"] = ArrayRecord({n: Array(a) for n, a in arrays.items()})
        return reply

    return fault


def to_nan(arrays: dict[str, Any]) -> None:
    next(iter(arrays.values()))[0, 0] = float("nan")


def to_rank_one(arrays: dict[str, Any]) -> None:
    name = next(name for name in arrays if name.endswith("lora_A.weight"))
    arrays[name] = arrays[name][:1]


def without_one(arrays: dict[str, Any]) -> None:
    arrays.pop(next(iter(arrays)))


def with_a_foreign_one(arrays: dict[str, Any]) -> None:
    arrays["base_model.model.evil.lora_A.weight"] = next(iter(arrays.values()))


def to_float64(arrays: dict[str, Any]) -> None:
    name = next(iter(arrays))
    arrays[name] = arrays[name].astype("float64")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raises, "[unexpected, RuntimeError]; the disk of this client is full"),
        (silent, "no answer before the deadline"),
        (edited(to_nan), "not finite"),
        (edited(to_rank_one), "has shape (1, 64); the plan asks for (8, 64)"),
        (edited(without_one), "1 missing"),
        (edited(with_a_foreign_one), "holds unasked base_model.model.evil.lora_A.weight"),
        (edited(to_float64), "float64"),
    ],
    ids=["raises", "silent", "nan", "shape", "missing", "foreign", "type"],
)
def test_a_bad_client_costs_its_own_update_only_and_a_line_says_so(
    fault: Fault,
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "time", Clock())
    logging.getLogger("rankfit").propagate = True
    settings = settings_for(tmp_path, "bad", "run.rounds=1", "server.round-timeout-seconds=6.0")
    with caplog.at_level("WARNING"):
        line = lines(run(settings, {2: fault}))[-1]
    assert line["updates"] == 3 and line["dropped"] == 1
    assert reason in line["clients"]["partition-2"]["reason"]
    assert any("update of partition-2 dropped" in r.getMessage() for r in caplog.records)
    assert all(line["clients"][f"partition-{i}"]["merged"] for i in (0, 1, 3))
    assert line["evaluation"]["accuracy"] > 0.1


def test_a_bad_update_leaves_the_same_adapter_as_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "time", Clock())
    quick = ("run.rounds=1", "server.round-timeout-seconds=6.0")
    bad = run(settings_for(tmp_path, "nan", *quick), {2: edited(to_nan)})
    none = run(settings_for(tmp_path, "none", *quick), {2: silent})
    assert lines(bad)[-1]["evaluation"] == lines(none)[-1]["evaluation"]


def test_a_run_in_which_every_update_fails_keeps_the_adapter_and_fails(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "all", "run.rounds=2")
    with pytest.raises(RunFailed, match=r"not one update was merged .*8 × client error"):
        run(settings, dict.fromkeys(range(4), raises))
    start, _, end = lines(tmp_path / "all")
    assert end["updates"] == 0 and end["evaluation"] == start["evaluation"]


def test_a_run_with_few_updates_says_so_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings_for(tmp_path, "few", "run.rounds=1"), dict.fromkeys(range(3), raises))
    assert "only 1 of 4 updates were merged; not: 3 × client error" in capsys.readouterr().out


def test_out_of_memory_loses_no_client_and_the_next_plan_is_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device of partition 2 has less than it declared: its cap is cut behind its back."""
    train = trainer.train

    def cut(workspace: Any, job: trainer.Job) -> trainer.Trained:
        if job.client == "partition-2":
            job = trainer.replace(job, cap_bytes=int(5.9 * 2**20))
        return train(workspace, job)

    monkeypatch.setattr(trainer, "train", cut)
    folder = run(settings_for(tmp_path, "oom"))
    first, second = (line["clients"]["partition-2"] for line in lines(folder)[1:3])
    assert first["merged"] and first["out-of-memory"] >= 1 and first["micro-batch"] == 16
    assert second["merged"] and "out-of-memory" not in second
    peaks = [
        p["plan"]["peak-bytes"]
        for p in lines(folder, "plans.jsonl")
        if p["client"] == "partition-2"
    ]
    assert len(peaks) >= 2 and peaks[1] < peaks[0]


def test_what_was_learnt_from_out_of_memory_survives_a_resume(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "kept", "run.rounds=1")
    folder = run(settings)
    checkpoint = RunDirectory(settings_for(tmp_path, "kept", "run.resume=true")).load()
    assert checkpoint is not None and checkpoint.round == 1
    assert checkpoint.strategy["ceilings"] == {} and len(checkpoint.strategy["identity"]) == 16
    assert (folder / "checkpoint").is_symlink()
    again = settings_for(tmp_path, "kept", "run.rounds=2", "run.resume=true")
    run(again)
    later = RunDirectory(again).load()
    assert later is not None and later.strategy["identity"] == checkpoint.strategy["identity"]


#: Ranks of the quickstart's three kinds of devices where they are not the plain 1, 2 and 8: one
#: rank for all, half the bytes back when one factor is trained, or ranks that differ by layer.
OTHER_RANKS = {
    "fedit": {1},
    "straggler": {1},
    "fedex-lora": {1},
    "exclusive": {8},
    "ffa-lora": {2},
    "rolora": {2},
    "alternating": {2, 5, 8},
    "flora": {1, 8},
    "lokr": {3},  # a unit of rank is 16 numbers, not 128; W₁ takes its share first
    "legend": {4, 8},
    "fed-hello-fim": {4, 8},
    "fed-hello-gd": {4, 8},
    "fed-hello-rgd": {4, 8},
}
#: What folds into the base needs a link for it.
FOLDING = ("plan.download-seconds=0.0",)


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_learns(method: str, tmp_path: Path) -> None:
    folding = FOLDING if find(method).start.folds else ()
    quick = ("run.rounds=3", "simulation.clients=3", "server.min-clients=3", *folding)
    form = f"lora.form={find(method).form}"
    folder = run(settings_for(tmp_path, method, f"method.name={method}", form, *quick))
    accuracy = [line["evaluation"]["accuracy"] for line in lines(folder)]
    assert accuracy[-1] > accuracy[0] + 0.1
    ranks = {c["rank"] for c in lines(folder)[1]["clients"].values()}
    assert ranks == OTHER_RANKS.get(method, {1, 2, 8})


def test_the_tail_gives_low_rank_clients_the_whole_adapter(tmp_path: Path) -> None:
    folder = run(
        settings_for(tmp_path, "remainder", "method.name=flexlora", "method.remainder=true")
    )
    plans = {p["client"]: p["plan"] for p in lines(folder, "plans.jsonl")}
    assert plans["partition-1"]["remainder-rank"] == 8
    client = lines(folder)[1]["clients"]["partition-1"]
    assert client["download-bytes"] > client["upload-bytes"]
    accuracy = [line["evaluation"]["accuracy"] for line in lines(folder)]
    assert accuracy[-1] > accuracy[0] + 0.2


def test_alternating_sends_back_one_factor(tmp_path: Path) -> None:
    folder = run(settings_for(tmp_path, "half", "method.name=alternating", "run.rounds=2"))
    head = 4 * (64 * 10 + 10)
    for line in lines(folder)[1:]:
        for client in line["clients"].values():
            both = client["download-bytes"] - head
            assert client["upload-bytes"] - head == both // 2


@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
def test_fewer_bytes_on_the_wire_learn_as_well(wire: str, tmp_path: Path, plain: Path) -> None:
    # An unlimited link, so that all types train the same ranks.
    links = ("plan.upload-seconds=0", "plan.download-seconds=0")
    folder = run(settings_for(tmp_path, wire, f"wire.dtype={wire}", *links))
    whole, fewer = lines(plain)[-1], lines(folder)[-1]
    assert fewer["evaluation"]["accuracy"] == pytest.approx(
        whole["evaluation"]["accuracy"], abs=0.08
    )
    settings = settings_for(tmp_path, wire, f"wire.dtype={wire}")
    base = load_base(settings, 10)
    targets = target_modules(base, settings.lora.targets)
    payload = Payload.of(base, targets, head_modules(base), wire)
    plans = {line["client"]: line["plan"] for line in lines(folder, "plans.jsonl")}
    for name, client in fewer["clients"].items():
        factors = payload.bytes_per_rank() * min(plans[name]["ranks"])
        assert client["upload-bytes"] == factors + payload.head_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_merging_on_a_gpu_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.merge-device"):
        run(settings_for(tmp_path, "gpu", "server.merge-device=cuda"))


def test_a_bf16_base_trains_float32_factors(tmp_path: Path) -> None:
    # Half the bytes of base and activations: the same budgets hold more.
    folder = run(settings_for(tmp_path, "bf16", "model.precision=bf16"))
    accuracy = [line["evaluation"]["accuracy"] for line in lines(folder)]
    assert accuracy[-1] > accuracy[0] + 0.2
    expected = {p["client"]: p["plan"]["peak-bytes"] for p in lines(folder, "plans.jsonl")}
    for name, client in lines(folder)[1]["clients"].items():
        # The trace holds the float32 pixels (8 KiB) beside the cast ones; the trainer does not.
        assert 0 <= expected[name] - client["peak-memory-bytes"] <= 8192


def test_checkpointing_takes_the_memory_that_was_planned(tmp_path: Path) -> None:
    folder = run(
        settings_for(tmp_path, "ckpt", "train.gradient-checkpointing=true", "run.rounds=1")
    )
    expected = {p["client"]: p["plan"]["peak-bytes"] for p in lines(folder, "plans.jsonl")}
    for name, client in lines(folder)[1]["clients"].items():
        assert abs(client["peak-memory-bytes"] - expected[name]) <= 1024


def test_clients_can_evaluate_in_the_servers_place(tmp_path: Path) -> None:
    folder = run(settings_for(tmp_path, "local", "server.evaluate=clients", "run.rounds=2"))
    rounds = lines(folder)
    assert "evaluation" not in rounds[0]
    assert rounds[2]["evaluation"]["accuracy"] > 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method.name=flexlore",), "did you mean 'flexlora'"),
        (("lora.rank=65", "lora.alpha=65.0"), "lora.rank 65 is above the rank that"),
        (("lora.targets=nothing",), "nothing"),
        (('fleet.memory-mib="0.5"',), "needs .* MiB at rank 1.*has 0.5 MiB"),
        (("data.source=no/such/file.csv",), "no/such/file.csv"),
        (("model.source=no/such-model",), "no/such-model"),
        (("partition.min-samples=5000",), "partition.min-samples"),
    ],
    ids=["method", "rank", "targets", "memory", "data", "model", "partition"],
)
def test_bad_input_is_one_clear_error_before_any_training(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(settings_for(tmp_path, "bad", *overrides))
    assert not (tmp_path / "bad").exists(), "a corrected run may take the same name"


def test_a_run_is_never_written_over(plain: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        run(settings_for(plain.parent, "plain"))


def test_a_run_of_an_older_release_is_resumed_at_the_defaults_of_what_is_new(
    plain: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "plain", symlinks=True)
    config = tmp_path / "plain" / "config.toml"
    text = config.read_text()
    assert 'form = "lora"\n' in text
    config.write_text(text.replace('form = "lora"\n', ""))
    folder = run(settings_for(tmp_path, "plain", "run.resume=true"))
    assert lines(folder) == lines(plain)


def test_a_resumed_run_keeps_its_settings(plain: Path) -> None:
    RunDirectory(
        settings_for(plain.parent, "plain", "run.resume=true", "server.evaluate-batch-size=8")
    )
    changed = settings_for(plain.parent, "plain", "run.resume=true", "lora.alpha=4.0")
    with pytest.raises(ConfigError, match="lora.alpha was 16.0, is 4.0"):
        FaultyGrid(changed, {})
        run(changed)
