"""Declared figures, client names, and the host's own figures."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rankfit.client import host
from rankfit.client.device import device_report
from rankfit.configs.settings import RunSettings, Scalar, from_flat
from rankfit.estimator.device_report import DeviceReport
from tests.client.nvml_stub.driver import ROOT

MIB = 2**20
FLEET = {"fleet.memory-mib": "512, 768,1024", "fleet.upload-mbps": "2,7.08"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def report(
    node_config: dict[str, Scalar], settings: dict[str, Scalar] | None = None
) -> DeviceReport:
    return device_report(node_config, from_flat(settings or {}), node_id=77)


def test_answers_without_torch_and_flower() -> None:
    code = (
        "import json, sys\n"
        "from rankfit.client.device import device_report\n"
        "from rankfit.configs.settings import RunSettings\n"
        "device_report({}, RunSettings(), node_id=1)\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(json.loads(done.stdout)) & {"torch", "flwr", "ray", "transformers", "peft"}


def test_ram_is_reported_without_a_gpu() -> None:
    got = report({})
    assert (got.accelerator, got.source, got.processes) == ("cpu", "ram", -1)
    assert got.name and got.note.startswith("no GPU") and got.total_bytes >= 64 * MIB
    assert DeviceReport.from_dict(got.to_dict()) == got


def test_fleet_is_dealt_in_turn() -> None:
    got = [report({"partition-id": index, "num-partitions": 5}, FLEET) for index in range(5)]
    assert [one.total_bytes // MIB for one in got] == [512, 768, 1024, 512, 768]
    assert [one.upload_mbps for one in got] == [2, 7.08, 2, 7.08, 2]
    assert {one.download_mbps for one in got} == {0.0}
    assert {one.source for one in got} == {"declared"}
    assert [one.client for one in got] == [f"partition-{index}" for index in range(5)]
    assert got[0].note.startswith("declared 512 MiB; no GPU")


def test_fleet_needs_a_partition_and_yields_to_the_node_config() -> None:
    assert report({}, FLEET).source == "ram"
    got = report({"partition-id": 1, "memory-mib": 300, "upload-mbps": 9}, FLEET)
    assert got.total_bytes == 300 * MIB and got.upload_mbps == 9


def test_links_alone_leave_the_memory_measured() -> None:
    got = report({"upload-mbps": 3})
    assert got.source == "ram" and got.upload_mbps == 3 and got.download_mbps == 0


def test_declared_beyond_ram_is_capped_to_its_size() -> None:
    got = report({"memory-mib": 1e9})
    assert got.total_bytes == got.free_bytes == host.host_memory().total_bytes
    assert "capped" in got.note and got.source == "declared"


@pytest.mark.parametrize("key", ["memory-mib", "upload-mbps", "download-mbps"])
@pytest.mark.parametrize("value", [0, -1, -0.5, "4096", "lots", True, float("nan"), float("inf")])
def test_bad_figures_name_key_value_and_remedy(key: str, value: Scalar) -> None:
    with pytest.raises(ValueError) as caught:
        report({key: value})
    text = str(caught.value)
    assert key in text and repr(value) in text and "--node-config" in text and "above 0" in text


@pytest.mark.parametrize("value", [-1, "0", 1.5, True])
def test_bad_partition(value: Scalar) -> None:
    with pytest.raises(ValueError, match="partition-id=.*whole number"):
        report({"partition-id": value})


@pytest.mark.parametrize("value", ["", "  ", 7, True])
def test_bad_client_name(value: Scalar) -> None:
    with pytest.raises(ValueError, match="client-name=.*expected text"):
        report({"client-name": value})


def test_client_name_order() -> None:
    assert report({"client-name": "berlin", "partition-id": 3}).client == "berlin"
    assert report({"partition-id": 3}).client == "partition-3"
    assert report({}).client == f"{socket.gethostname()}-77"


# ------------------------------------------------------------------------- the host's memory


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       8388608 kB\nMemFree: 1048576 kB\nMemAvailable:    4194304 kB\n"
GIB = 2**30


def test_meminfo(tmp_path: Path) -> None:
    machine(tmp_path, {"proc/meminfo": MEMINFO})
    assert host.host_memory(tmp_path) == host.Memory(8 * GIB, 4 * GIB)


def test_meminfo_of_an_old_kernel(tmp_path: Path) -> None:
    text = "MemTotal: 8388608 kB\nMemFree: 1048576 kB\nBuffers: 0 kB\nCached: 1048576 kB\n"
    machine(tmp_path, {"proc/meminfo": text})
    assert host.host_memory(tmp_path).free_bytes == 2 * GIB


def test_cgroup_v2_limits_of_all_levels(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/pod/memory.current": f"{GIB}\n",
        "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/box/memory.current": f"{GIB}\n",
    }
    machine(tmp_path, files)
    assert host.host_memory(tmp_path) == host.Memory(2 * GIB, 2 * GIB - GIB // 2)


def test_cgroup_v2_inside_a_container(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/../../on-the-host\n",
        "sys/fs/cgroup/memory.max": str(GIB),
        "sys/fs/cgroup/memory.current": str(2 * GIB),  # over the limit for a moment
    }
    machine(tmp_path, files)
    assert host.host_memory(tmp_path) == host.Memory(GIB, 0)


def test_cgroup_v1(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": str(3 * GIB),
        "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/docker/abc/memory.stat": f"total_inactive_file {GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(4 * GIB),
    }
    machine(tmp_path, files)
    assert host.host_memory(tmp_path) == host.Memory(3 * GIB, 2 * GIB)


def test_without_proc_posix_is_asked(tmp_path: Path) -> None:
    expected = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host.host_memory(tmp_path).total_bytes == expected


def test_unknown_memory_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    with pytest.raises(OSError, match="memory-mib=4096"):
        host.host_memory(tmp_path)


def test_processor_name(tmp_path: Path) -> None:
    machine(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Some Processor 9000\n"})
    assert host.processor_name(tmp_path) == "Some Processor 9000"
    assert host.processor_name(tmp_path / "absent")


def test_settings_default_declares_nothing() -> None:
    assert device_report({"partition-id": 0}, RunSettings(), node_id=1).source == "ram"
