"""docker/compose.yaml and docker/Dockerfile, checked without Docker.

The Compose Specification's schema, and what a schema cannot say: names that are used exist, every
flag is one that the installed Flower and RankFit commands have, and nothing is open to the network.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
INSTRUCTIONS = re.findall(
    r"^([A-Z]+)\s+(.*(?:\\\n.*)*)", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE
)


def words(service: str) -> list[str]:
    """The command of a service as one list, the script of ``sh -c`` taken apart too."""
    command = [str(word) for word in SERVICES[service]["command"]]
    return shlex.split(command[2].replace(";", " ")) if command[:2] == ["sh", "-c"] else command


@cache
def flags(*command: str) -> frozenset[str]:
    """Every ``--flag`` in the help of a command of this Python environment."""
    program: tuple[str, ...] = (str(Path(sys.executable).with_name(command[0])),)
    if command[0] == "rankfit":
        program = (sys.executable, "-m", "rankfit.cli.main")
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [*program, *command[1:], "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return frozenset(re.findall(r"--[a-z][a-z-]+", done.stdout))


def given_flags(items: list[str]) -> set[str]:
    return {item.split("=")[0] for item in items if item.startswith("--")}


def test_compose_file_keeps_the_specification() -> None:
    schema = json.loads((Path(__file__).parent / "compose_spec.json").read_text())
    jsonschema.Draft201909Validator(schema).validate(COMPOSE)


def test_schema_refuses_what_is_wrong() -> None:
    schema = json.loads((Path(__file__).parent / "compose_spec.json").read_text())
    wrong = {"services": {"one": {"image": "x", "comand": ["y"]}}}
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        jsonschema.Draft201909Validator(schema).validate(wrong)


@pytest.mark.parametrize("service", SERVICES)
def test_service_refers_to_what_exists(service: str) -> None:
    spec = SERVICES[service]
    assert set(spec.get("secrets", [])) <= set(COMPOSE["secrets"])
    for volume in spec.get("volumes", []):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or source.startswith((".", "$"))
    assert {entry["source"] for entry in spec.get("configs", [])} <= set(COMPOSE["configs"])
    assert set(spec.get("depends_on", {})) <= set(SERVICES)
    text = " ".join(map(str, spec["command"])).replace("$$node", "node-1")
    for secret in re.findall(r"/run/secrets/([\w.-]+)", text):
        assert secret in spec["secrets"], f"{service} reads {secret} but does not mount it"
    build = spec["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKER / "Dockerfile"
    declared = {value.split("=")[0] for name, value in INSTRUCTIONS if name == "ARG"}
    assert set(build["args"]) <= declared


def test_everything_declared_is_used() -> None:
    for kind in ("secrets", "volumes"):
        used = {
            str(entry).split(":")[0] for spec in SERVICES.values() for entry in spec.get(kind, [])
        }
        assert used == set(COMPOSE[kind])


def test_flower_flags_exist() -> None:
    assert given_flags(words("superlink")) <= flags("flower-superlink")
    for service in ("supernode-1", "supernode-2"):
        assert given_flags(words(service)) <= flags("flower-supernode")
    assert "flwr supernode register" in " ".join(words("register"))
    assert given_flags(words("register")) <= flags("flwr", "supernode", "register")


@pytest.mark.parametrize("guide", ["deployment.md", "devices.md"])
def test_guides_use_flags_that_exist(guide: str) -> None:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / guide).read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    programs = {
        "flower-superlink": 1,
        "flower-supernode": 1,
        "flwr supernode": 3,
        "flwr": 2,
        "rankfit": 2,
    }
    checked = 0
    for line in lines:
        for start, length in programs.items():
            if line.startswith(start + " "):
                program = tuple(line.split()[:length])
                assert given_flags(shlex.split(line, comments=True)) <= flags(*program), line
                checked += 1
                break
    assert checked


def test_submit_uses_a_known_connection_and_flags() -> None:
    assert words("submit")[:2] == ["rankfit", "run"]
    assert given_flags(words("submit")) <= flags("rankfit", "run")
    connections = tomllib.loads((DOCKER / "flwr-config.toml").read_text())["superlink"]
    assert words("submit")[-1] in connections and connections["default"] in connections
    connection = connections["deployment"]
    assert connection["address"] == "superlink:8000" and "insecure" not in connection
    secret = Path(connection["root-certificates"]).name
    for service in ("register", "submit"):
        assert secret in SERVICES[service]["secrets"]


def test_nothing_is_insecure_or_open_to_the_network() -> None:
    for service, spec in SERVICES.items():
        assert "--insecure" not in words(service)
        assert "privileged" not in spec and spec["cap_drop"] == ["ALL"]
        for port in spec.get("ports", []):
            assert port.startswith("${RANKFIT_BIND:-127.0.0.1}:")
    assert "--enable-supernode-auth" in words("superlink")
    keys = [secret for secret in COMPOSE["secrets"] if secret.startswith("node-")]
    for key in (key for key in keys if not key.endswith(".pub")):
        assert [name for name, spec in SERVICES.items() if key in spec["secrets"]] == [
            key.replace("node", "supernode")
        ]
    assert "ca.key" not in COMPOSE["secrets"]


def test_each_supernode_has_one_gpu_of_its_own_with_nvml() -> None:
    ids = []
    for service in ("supernode-1", "supernode-2"):
        (device,) = SERVICES[service]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and {"gpu", "utility"} <= set(device["capabilities"])
        assert len(device["device_ids"]) == 1
        ids += device["device_ids"]
    assert len(set(ids)) == 2


def test_node_configs_are_ones_that_the_device_report_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.common.config import parse_config_args

    from rankfit.client.device import device_report
    from rankfit.configs.settings import RunSettings

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    reports = []
    for service in ("supernode-1", "supernode-2"):
        (text,) = [
            word.removeprefix("--node-config=") for word in words(service) if "node-config" in word
        ]
        reports.append(device_report(parse_config_args([text]), RunSettings(), node_id=1))
    assert [report.client for report in reports] == ["node-1", "node-2"]
    assert reports[1].source == "declared" and reports[1].upload_mbps == 20


def test_image_holds_the_whole_package() -> None:
    copied = {
        source for name, value in INSTRUCTIONS if name == "COPY" for source in value.split()[:-1]
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"])
    needed |= {"rankfit", "constraints.txt", project["project"]["readme"]}
    assert needed <= copied
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*" and copied == {line[1:] for line in ignore if line.startswith("!")}


def test_image_runs_as_a_user_and_has_nvml() -> None:
    names = [name for name, _ in INSTRUCTIONS]
    users = [value for name, value in INSTRUCTIONS if name == "USER"]
    assert users == ["rankfit"] and names.index("USER") > len(names) - 4
    environment = " ".join(value for name, value in INSTRUCTIONS if name == "ENV")
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in environment
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python == ">=3.11" and ("ARG", "PYTHON=3.11") in INSTRUCTIONS
