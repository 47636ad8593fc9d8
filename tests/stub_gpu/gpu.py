"""The environment of processes that see stub GPUs."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.stub_gpu.build import build, install

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: Where the wheels and libraries lie; outside of git.
HOME = Path(os.environ.get("STUB_GPU_HOME") or ROOT / ".stub-gpu")
MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One stub GPU.

    Attributes
    ----------
    mib : int
        Memory as NVML gives it, of which the driver keeps ``reserved_mib``.
    capability : str
        Compute capability.
    context_mib : int
        What a process takes by its CUDA context.
    more : Mapping[str, str]
        Further keys of ``libraries/device.h``.
    """

    mib: int = 8192
    capability: str = "9.0"
    name: str = "Stub GPU"
    reserved_mib: int = 400
    context_mib: int = 470
    more: Mapping[str, str] | None = None

    def variables(self, index: int) -> dict[str, str]:
        """Environment that makes this GPU number ``index``."""
        keys = {
            "NAME": self.name,
            "UUID": uuid(index),
            "CC": self.capability,
            "TOTAL": str(self.mib * MIB),
            "RESERVED": str(self.reserved_mib * MIB),
            "CONTEXT": str(self.context_mib * MIB),
            **(self.more or {}),
        }
        return {f"NVML_STUB_{index}_{key}": value for key, value in keys.items()}


def uuid(index: int) -> str:
    """UUID of GPU ``index``."""
    return f"GPU-{index:08x}-0000-4000-8000-000000000000"


def environment(state: Path, *gpus: Gpu, compute: str = "integers") -> dict[str, str]:
    """Whole environment of a process that sees these GPUs.

    Parameters
    ----------
    state : Path
        Folder by which processes know of each other's use of the GPUs.
    compute : {"integers", "all", "nothing"}
        See ``computing.py``.
    """
    site = install(HOME)
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("CUDA_", "NVML_STUB_", "STUB_GPU_"))
    }
    devices: dict[str, str] = {}
    for index, gpu in enumerate(gpus):
        devices |= gpu.variables(index)
    state.mkdir(parents=True, exist_ok=True)
    return inherited | devices | {
        "NVML_STUB_GPUS": str(len(gpus)),
        "STUB_GPU_STATE": str(state),
        "STUB_GPU_COMPUTE": compute,
        "STUB_GPU_HOME": str(HOME),
        "LD_LIBRARY_PATH": str(build(HOME, site)),
        "PYTHONPATH": os.pathsep.join([str(HERE / "start"), str(site), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run(environ: Mapping[str, str], *command: str, timeout: float = 300) -> str:
    """Output of a command of the project's environment, ``python`` first, that must succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        env=dict(environ), cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


if __name__ == "__main__":  # python -m tests.stub_gpu.gpu STATE COMMAND…: on one GPU of 8 GiB
    chosen = Gpu(int(os.environ.get("STUB_MIB", 8192)), os.environ.get("STUB_CAPABILITY", "9.0"))
    told = environment(
        Path(sys.argv[1]).resolve(), chosen, compute=os.environ.get("STUB_GPU_COMPUTE", "integers")
    )
    os.execvpe(sys.argv[2], sys.argv[2:], told)
