"""Builds the stub driver library and asks for device reports on top of it.

The genuine nvidia-ml-py loads the library in a subprocess, found through LD_LIBRARY_PATH.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
#: Where device.h lies, which tells NVML and the stub's CUDA of the same devices.
DEVICES = ROOT / "tests" / "stub_gpu" / "libraries"
MIB = 2**20

_ASK = """
import json, os, sys
from rankfit.client.accelerate_config import DataParallel
from rankfit.client.device import Placement, device_report
from rankfit.configs.settings import RunSettings, from_flat

answers = []
for case in json.load(sys.stdin):
    for key in [key for key in os.environ if key.startswith(("NVML_STUB_", "CUDA_"))]:
        del os.environ[key]
    os.environ.update(case["environment"])
    pids = os.environ.get("NVML_STUB_0_PIDS", "").replace("SELF", str(os.getpid()))
    os.environ["NVML_STUB_0_PIDS"] = pids
    try:
        report = device_report(
            case["node_config"],
            from_flat(case["settings"]),
            node_id=77,
            samples=case["samples"],
            group=DataParallel(**case["group"]) if case["group"] else None,
            placement=Placement(**case["placement"]) if case["placement"] else None,
        )
        answers.append(report.to_dict())
    except ValueError as error:
        answers.append({"error": str(error)})
print(json.dumps({"answers": answers, "modules": sorted(sys.modules)}))
"""


def build(folder: Path, *flags: str) -> Path:
    """Compile the stub into ``folder`` and return the folder, for LD_LIBRARY_PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", f"-I{DEVICES}", *flags]
    command += [str(HERE / "nvml_stub.c"), "-o", str(folder / "libnvidia-ml.so.1")]
    subprocess.run(command, check=True)
    return folder


def gpu(
    index: int = 0,
    *,
    name: str = "NVIDIA H100 80GB HBM3",
    uuid: str = "GPU-aaaaaaaa-0000-0000-0000-000000000000",
    capability: str = "9.0",
    total_mib: int = 81559,
    free_mib: int = 81000,
    reserved_mib: int = 500,
    **more: str,
) -> dict[str, str]:
    """Environment that makes GPU ``index``; ``more`` are further keys of nvml_stub.c.

    ``SELF`` in ``PIDS`` of GPU 0 stands for the process that reports.
    """
    keys = {
        "NAME": name,
        "UUID": uuid,
        "CC": capability,
        "TOTAL": str(total_mib * MIB),
        "FREE": str(free_mib * MIB),
        "RESERVED": str(reserved_mib * MIB),
        **more,
    }
    return {"NVML_STUB_GPUS": str(index + 1)} | {
        f"NVML_STUB_{index}_{key}": value for key, value in keys.items()
    }


Asked = dict[str, object]


@dataclass(frozen=True)
class Answers:
    """Device reports as they travel, or ``{"error": text}``; and the modules they took."""

    reports: list[Asked]
    modules: frozenset[str]


def ask_many(library: Path | None, cases: Sequence[Mapping[str, object]]) -> Answers:
    """Reports of several cases from one fresh process; see :func:`ask`."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("CUDA_", "NVML_", "LD_LIBRARY_PATH"))
    }
    if library is not None:
        inherited["LD_LIBRARY_PATH"] = str(library)
    whole = [
        {"environment": {}, "node_config": {}, "settings": {}, "samples": -1}
        | {"group": {}, "placement": {}}
        | dict(case)
        for case in cases
    ]
    done = subprocess.run(
        [sys.executable, "-c", _ASK],
        input=json.dumps(whole),
        env=inherited,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return Answers(answer["answers"], frozenset(answer["modules"]))


def ask(
    library: Path | None,
    environment: Mapping[str, str] | None = None,
    node_config: Mapping[str, object] | None = None,
    settings: Mapping[str, object] | None = None,
    samples: int = -1,
    group: Mapping[str, object] | None = None,
    placement: Mapping[str, object] | None = None,
) -> Asked:
    """One report from a fresh process; ``library`` is the folder of the stub, None for none."""
    case = {
        "environment": dict(environment or {}),
        "node_config": dict(node_config or {}),
        "settings": dict(settings or {}),
        "samples": samples,
        "group": dict(group or {}),
        "placement": dict(placement or {}),
    }
    return ask_many(library, [case]).reports[0]
