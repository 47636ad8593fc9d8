"""Flower's processes on stub GPUs: simulations on unlike GPUs, and SuperNodes with one each."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tomli_w

from rankfit.cli.flower import end_marked
from rankfit.configs.compose import compose
from rankfit.configs.settings import to_flat
from tests.processes.deployment import ENVIRONMENT, Deployment, command, deployment
from tests.stub_gpu.gpu import ROOT, Gpu, environment, uuid

MARK = "RANKFIT_TEST_GPU"
SMALL = (
    "quickstart", "run.rounds=3", "run.name=gpu", "partition.kind=iid", "fleet.memory-mib=",
    "fleet.upload-mbps=", "fleet.download-mbps=", "data.test-samples=60",
)  # fmt: skip
#: The context of a stub GPU takes 470 MiB of it: on the last one little is left.
LARGE, MIDDLE, TIGHT = Gpu(24576, "8.9"), Gpu(8192, "8.9"), Gpu(558, "8.9", reserved_mib=64)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "gpu" / name).read_text().splitlines()]


def rounds(folder: Path) -> list[dict]:
    return lines(folder, "rounds.jsonl")[1:]


def keeps_to_its_plan(own: Mapping[str, float]) -> bool:
    """Whether a measured peak is within 1 % of the expected one."""
    return abs(own["peak-memory-bytes"] / own["expected-peak-bytes"] - 1) <= 0.01


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    """A folder for the run; whatever is left running is ended by id."""
    yield tmp_path
    end_marked(MARK, str(tmp_path), 5.0)


@pytest.mark.parametrize("share", [1, 0.5])
def test_a_simulation_plans_for_the_smallest_of_the_gpus(machine: Path, share: float) -> None:
    stub = environment(machine / "state", LARGE, MIDDLE)
    own = {**stub, **ENVIRONMENT, MARK: str(machine)}
    arguments = (
        *SMALL, "simulation.clients=4", "server.clients-per-round=4", "server.min-clients=4",
        f"simulation.gpus-per-client={share}", f"run.directory={machine}",
    )  # fmt: skip
    done = subprocess.run(
        [command("rankfit"), "run", *arguments],
        env=own, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for line in rounds(machine):
        assert (line["updates"], line["dropped"]) == (4, 0)
        assert all(keeps_to_its_plan(own) for own in line["clients"].values()), line["clients"]
    plans = lines(machine, "plans.jsonl")
    most = int((MIDDLE.mib - MIDDLE.reserved_mib) * share) * 2**20
    assert all(row["plan"]["budget-bytes"] <= most for row in plans)


def test_supernodes_train_on_a_gpu_each(machine: Path) -> None:
    stub = environment(machine / "state", MIDDLE, LARGE, TIGHT)
    own = {key: value for key, value in stub.items() if os.environ.get(key) != value}
    with deployment(machine / "d", own) as running:
        for index, name in enumerate(("middle", "large", "tight")):
            running.register(name)
            running.start_supernode(
                name, f'client-name="{name}" partition-id={index} num-partitions=3',
                environment={"CUDA_VISIBLE_DEVICES": uuid(index)},
            )  # fmt: skip
        running.wait_online(3)
        run(running, machine)
    ranks = {}
    for number, line in enumerate(rounds(machine), 1):
        assert (line["updates"], line["dropped"]) == (3, 0), line
        for name, own in line["clients"].items():
            ranks[name] = own["rank"]
            assert number == 1 or keeps_to_its_plan(own), (number, name, own)
    assert ranks["middle"] == ranks["large"] > ranks["tight"] >= 1


def run(running: Deployment, folder: Path) -> None:
    """Submit the run and wait for its end."""
    few = (
        "lora.rank=32",
        "server.clients-per-round=3",
        "server.min-clients=3",
        f"run.directory={folder}",
    )
    config = folder / "run.toml"
    config.write_text(tomli_w.dumps(dict(to_flat(compose([*SMALL, *few])))), "utf-8")
    done = running.run(ROOT, "--run-config", str(config), timeout=600)
    assert done.status == "finished:completed", done.log[-3000:]
