"""The deployments of docker/compose.yaml and of the README, with their own command lines.

Containers and machines become processes of this one: paths, hosts and ports are put in their place,
and nothing else of a line is changed but the number of rounds.
"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.processes.deployment import ROOT, Deployment, command, deployment, free_port
from tests.server.test_loop import lines

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="needs openssl and ssh-keygen",
    ),
]

MIB = 2**20


def start_node(running: Deployment, name: str, line: list[str]) -> None:
    """Start a SuperNode by its documented line; all nodes of this machine need other ports."""
    assert line[0] == "flower-supernode"
    flags = [flag for flag in line[1:] if not flag.startswith("--port=")]
    running.start(name, line[0], *flags, f"--port={free_port()}")


def rankfit(running: Deployment, line: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a documented ``rankfit run`` line, for two rounds."""
    assert line[:2] == ["rankfit", "run"]
    return subprocess.run(
        [command("rankfit"), *line[1:], "run.rounds=2"],
        cwd=running.folder, env=dict(running.environment), capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip


def plans(folder: Path) -> dict[str, dict[str, Any]]:
    """Last plan of each client, with the device report that it rests on."""
    return {line["client"]: line for line in lines(folder, "plans.jsonl")}


def test_composes_nodes_are_planned_by_what_they_have(tmp_path: Path) -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]

    def here(running: Deployment, word: str) -> str:
        return (
            word.replace("/run/secrets/", f"{running.credentials}/")
            .replace("superlink:8000", f"127.0.0.1:{running.port}")
            .replace("$$", "$")
        )

    with deployment(tmp_path / "deployment") as running:
        for name in ("node-1", "node-2"):
            running.make_key(name)
        script = [here(running, word) for word in services["register"]["command"]]
        subprocess.run(
            script, env=dict(running.environment), check=True, capture_output=True, timeout=120
        )
        for name in ("supernode-1", "supernode-2"):
            start_node(running, name, [here(running, w) for w in services[name]["command"]])
        running.wait_online(2)
        done = rankfit(running, services["submit"]["command"])
        assert done.returncode == 0, done.stdout + done.stderr
        folder = running.folder / "runs" / "deployment"
        assert "small-devices describes simulated devices" in done.stderr
    found = plans(folder)
    assert set(found) == {"node-1", "node-2"}
    first, second = (found[name]["device"] for name in ("node-1", "node-2"))
    # No GPU here: the RAM of this machine, and a link that is not known and so no bound.
    assert first["source"] == "ram"
    assert first["total-bytes"] == psutil.virtual_memory().total
    assert (first["upload-mbps"], first["download-mbps"]) == (0, 0)
    assert (second["source"], second["total-bytes"]) == ("declared", 8192 * MIB)
    assert (second["upload-mbps"], second["download-mbps"]) == (20, 100)
    for client in found.values():
        assert (max(client["plan"]["ranks"]), client["plan"]["binding"]) == (8, "cap"), client
    assert [len(line["clients"]) for line in lines(folder)[1:]] == [2, 2]
    record = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
    assert len(record["clients"]) == 2


def test_the_readmes_commands_make_a_deployment(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Several machines")[2]
    block = re.findall(r"```console\n(.*?)```", text, re.DOTALL)[0].replace("\\\n", " ")
    said = [shlex.split(line, comments=True) for line in block.splitlines()]
    (node,) = [words for words in said if words[:1] == ["flower-supernode"]]
    (run,) = [words for words in said if words[:1] == ["rankfit"]]
    (register,) = [words for words in said if words[:2] == ["flwr", "supernode"]]
    assert any(words[:1] == ["flower-superlink"] for words in said)
    with deployment(tmp_path / "deployment") as running:
        for index, (name, declared) in enumerate((("berlin", ""), ("oslo", " memory-mib=5.98"))):
            running.make_key(name)

            def here(word: str, name: str = name) -> str:
                changed = word.replace("superlink.example.org:8000", f"127.0.0.1:{running.port}")
                changed = changed.replace("berlin", name)
                path = running.credentials / Path(changed).name
                return str(path) if path.exists() and "=" not in word else changed

            done = running.flwr(*[here(word) for word in register[1:]][:-1], name)
            assert done.returncode == 0, done.stdout + done.stderr
            line = [here(word) for word in node]
            line[-1] = line[-1].replace("partition-id=0", f"partition-id={index}") + declared
            start_node(running, name, line)
        running.wait_online(2)
        # Settings of simulated devices do not count, wherever they come from.
        done = rankfit(running, [*run, "fleet.memory-mib=1", "fleet.upload-mbps=0.001"])
        assert done.returncode == 0, done.stdout + done.stderr
        folder = running.folder / "runs" / "first"
        ignored = "not used, they count in a simulation alone: fleet.memory-mib, fleet.upload-mbps"
        assert done.stdout.count(ignored) == 1
        for name in ("berlin", "oslo"):
            told = (running.folder / f"{name}.log").read_text(errors="replace")
            assert told.count(ignored) == 1, told[-3000:]
    found = plans(folder)
    assert {
        name: (max(p["plan"]["ranks"]), p["device"]["source"]) for name, p in found.items()
    } == {
        "berlin": (8, "ram"),
        "oslo": (2, "declared"),
    }
    assert [len(line["clients"]) for line in lines(folder)[1:]] == [2, 2]
