"""RankFit itself on a SuperLink with TLS and two registered SuperNodes of different memory."""

import shutil
from pathlib import Path

import pytest
import tomli_w

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


def test_two_nodes_train_at_their_own_ranks_and_a_stranger_is_refused(tmp_path: Path) -> None:
    settings = compose(
        [
            "quickstart", "run.name=tls", f"run.directory={tmp_path / 'runs'}", "run.rounds=2",
            "simulation.clients=2", "server.clients-per-round=2", "server.min-clients=2",
            'fleet.memory-mib=""', 'fleet.upload-mbps=""', 'fleet.download-mbps=""',
            "partition.kind=iid",
        ]
    )  # fmt: skip
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(dict(to_flat(settings))))
    with deployment(tmp_path / "deployment") as federation:
        for index, (name, memory) in enumerate((("small", 5.98), ("large", 16))):
            federation.register(name)
            federation.start_supernode(
                name,
                f'client-name="{name}" memory-mib={memory} partition-id={index} num-partitions=2',
            )
        federation.wait_online(2)
        federation.make_key("stranger")
        stranger = federation.start_supernode("stranger", 'client-name="stranger"')
        federation.wait_for(
            lambda: stranger.popen.poll() is not None, "the stranger is refused", stranger
        )
        assert stranger.popen.returncode == 1
        assert "Failed to activate SuperNode" in stranger.text()
        done = federation.run(ROOT, "--run-config", str(config))
    assert done.status == "finished:completed", done.log
    folder = tmp_path / "runs" / "tls"
    rounds = lines(folder)
    assert [line["round"] for line in rounds] == [0, 1, 2]
    for line in rounds[1:]:
        assert {name: client["rank"] for name, client in line["clients"].items()} == {
            "large": 8,
            "small": 2,
        }
        assert all(client["merged"] for client in line["clients"].values())
    assert rounds[-1]["evaluation"]["accuracy"] > rounds[0]["evaluation"]["accuracy"]
    assert (folder / "checkpoint" / "adapter_model.safetensors").is_file()
    devices = {p["client"]: p["device"] for p in lines(folder, "plans.jsonl")}
    assert devices["small"]["source"] == "declared"
