"""Whole federations whose clients train on stub GPUs: every update comes back and is merged."""

import json
from pathlib import Path

import pytest

from tests.stub_gpu.gpu import Gpu

RUNS = """
import json, sys
from pathlib import Path
from tests.server.federation import run, settings_for
folder = run(settings_for(Path(sys.argv[1]), "gpu", "fleet.memory-mib=", "run.rounds=2",
                          *json.loads(sys.argv[2])))
print(folder)
"""


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("mib", "overrides"),
    [
        (8192, ()),
        (24576, ("model.precision=bf16",)),
        (8192, ("train.gradient-checkpointing=true", "train.autocast=bf16")),
        (8192, ("server.evaluate=clients", "server.merge-device=cuda")),
    ],
    ids=["fp32", "bf16", "checkpointing and autocast", "evaluation and merge on the GPU"],
)
def test_every_update_of_a_gpu_is_merged_within_its_plan(on, tmp_path, mib, overrides):
    program = RUNS.replace("sys.argv[1]", repr(str(tmp_path)))
    program = program.replace("sys.argv[2]", repr(json.dumps(list(overrides))))
    on(program, Gpu(mib, "8.9"))
    folder = tmp_path / "gpu"
    plans = lines(folder, "plans.jsonl")
    assert {plan["device"]["source"] for plan in plans} == {"nvml"}
    assert {plan["device"]["compute-capability"] for plan in plans} == {"8.9"}
    rounds = lines(folder, "rounds.jsonl")[1:]
    assert [(line["updates"], line["dropped"]) for line in rounds] == [(4, 0), (4, 0)]
    for line in rounds:
        for own in line["clients"].values():
            assert own["peak-memory-bytes"] <= 1.05 * own["expected-peak-bytes"]


LIMITS = """
import json
from types import SimpleNamespace
import torch
from rankfit.client.trainer import _allocator_bytes
device = torch.device("cuda", 0)
torch.empty(1, device=device)
found = []
for keeps, cap, peak, outside in json.loads(CASES):
    workspace = SimpleNamespace(
        device=device, group=SimpleNamespace(size=1), keeps_to_plan=keeps
    )
    plan = SimpleNamespace(peak_bytes=peak, outside_bytes=outside)
    found.append(_allocator_bytes(workspace, SimpleNamespace(cap_bytes=cap), plan))
print(json.dumps(found))
"""


def test_no_plan_talks_a_node_out_of_its_own_limit(on):
    """600 MiB are allowed, of which the context takes 470; what plans claim comes below that."""
    mib, cases = 2**20, []
    for keeps, cap, peak, outside in (
        (True, 600, 550, 470), (False, 600, 550, 470), (True, None, 550, 470),
        (True, 600, 550, -(10**6)), (True, 600, 10**6, 1), (True, 600, 550, 0),
    ):  # fmt: skip
        cases.append((keeps, None if cap is None else cap * mib, peak * mib, outside * mib))
    program = LIMITS.replace("CASES", repr(json.dumps(cases)))
    found = json.loads(on(program, Gpu(8192, "8.9", context_mib=470)).splitlines()[-1])
    most = 130 * mib
    assert found == [
        [80 * mib, most], [most, most], [80 * mib, None], [most, most], [most, most], [most, most],
    ]  # fmt: skip


def test_losses_and_accuracies_are_those_of_a_cpu(on, tmp_path):
    """What the stub computes in full is what the CPU computes, step by step."""
    few = ["train.steps=2", "data.test-samples=60", "server.diagnostics=false"]
    for name, visible in (("gpu", "0"), ("cpu", "")):
        program = RUNS.replace("sys.argv[1]", repr(str(tmp_path))).replace('"gpu"', repr(name))
        own = [*few, f"fleet.memory-mib={'' if visible else 2048}"]
        program = program.replace("sys.argv[2]", repr(json.dumps(own)))
        on(program, Gpu(8192, "8.9"), compute="all", CUDA_VISIBLE_DEVICES=visible)
    on_gpu, on_cpu = (lines(tmp_path / name, "rounds.jsonl") for name in ("gpu", "cpu"))
    for one, other in zip(on_gpu[1:], on_cpu[1:], strict=True):
        assert one["updates"] == other["updates"] == 4
        for client, own in one["clients"].items():
            same = other["clients"][client]
            assert own["rank"] == same["rank"], "the link bounds it"
            assert own["train-loss"] == pytest.approx(same["train-loss"], rel=1e-4)
        assert one["evaluation"]["accuracy"] == other["evaluation"]["accuracy"]
