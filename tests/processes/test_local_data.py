"""Two SuperNodes that hold different folders: they train together, the server sees no sample."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image
from sklearn.datasets import load_digits

from rankfit.configs.compose import compose
from rankfit.configs.settings import to_flat
from tests.processes.deployment import ROOT, deployment
from tests.server.test_loop import lines

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="needs openssl and ssh-keygen",
    ),
]


def write_digits(folder: Path, classes: range, first: int, last: int, part: str) -> int:
    """Save digits of some classes as folders of pictures; returns how many."""
    digits, count = load_digits(), 0
    for label in classes:
        own = digits.images[digits.target == label][first:last]
        (folder / part / str(label)).mkdir(parents=True)
        for number, picture in enumerate(own):
            grey = (picture / 16 * 255).round().astype(np.uint8)
            Image.fromarray(grey).save(folder / part / str(label) / f"{number}.png")
        count += len(own)
    return count


def test_two_nodes_with_folders_of_their_own(tmp_path: Path) -> None:
    held = {}
    for name, classes in (("low", range(0, 6)), ("high", range(4, 10))):
        folder = tmp_path / f"data-{name}"
        first = 0 if name == "low" else 80
        held[name] = write_digits(folder, classes, first, first + 60, "train")
        write_digits(folder, classes, 150, 170, "test")
    # The server is told of a folder that is not there: a look at any data would end the run.
    settings = compose(
        [
            "quickstart", "run.name=local", f"run.directory={tmp_path / 'runs'}", "run.rounds=2",
            f"data.source={tmp_path / 'nowhere'}", "partition.kind=local",
            'data.class-names="0,1,2,3,4,5,6,7,8,9"', "server.evaluate=clients",
            "server.clients-per-round=2", "server.min-clients=2",
            'fleet.memory-mib=""', 'fleet.upload-mbps=""', 'fleet.download-mbps=""',
        ]
    )  # fmt: skip
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(dict(to_flat(settings))))
    accelerate = tmp_path / "accelerate.yaml"  # one of them trains in two processes
    accelerate.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    with deployment(tmp_path / "deployment") as federation:
        for name in held:
            federation.register(name)
            node = f'client-name="{name}" data-path="{tmp_path / f"data-{name}"}"'
            if name == "high":
                node += f' accelerate-config="{accelerate}"'
            federation.start_supernode(name, node)
        federation.wait_online(2)
        done = federation.run(ROOT, "--run-config", str(config))
    assert done.status == "finished:completed", done.log
    folder = tmp_path / "runs" / "local"
    rounds = lines(folder)
    assert [line["round"] for line in rounds] == [0, 1, 2] and "evaluation" not in rounds[0]
    for line in rounds[1:]:
        assert {c: own["num-examples"] for c, own in line["clients"].items()} == held
        assert all(own["merged"] for own in line["clients"].values())
    first, last = rounds[1]["evaluation"], rounds[-1]["evaluation"]
    assert last["accuracy"] > max(first["accuracy"], 0.6)
    # What came back from the nodes is factors, a head and numbers.
    assert not (folder / "partition.json").exists()
    for line in rounds[1:]:
        for own in line["clients"].values():
            assert all(isinstance(value, int | float | bool) for value in own.values())
            assert own["upload-bytes"] == own["parameters"] * 4
    assert "nowhere" not in json.dumps(rounds)
