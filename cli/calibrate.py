"""``rankfit calibrate``: the calibration terms of this machine's GPU, measured."""

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rankfit.cli.estimate import Format, write
from rankfit.configs.settings import ConfigError

if TYPE_CHECKING:
    from rankfit.estimator.calibration import Profile

_COLUMNS = ("term", "value", "source")


def calibrate(
    out: Annotated[Path, typer.Option(help="Profile to write.")] = Path("calibration.toml"),
    form: Annotated[Format, typer.Option("--format", help="table, json or latex.")] = Format.TABLE,
) -> None:
    """Measure the calibration terms on this machine's GPU, and write a profile of them.

    Give it to a run or an estimate as ``plan.calibration=FILE``. Without a GPU it shows the table's
    terms and exits with 1.
    """
    import torch

    from rankfit.estimator.calibration import TERMS

    if not torch.cuda.is_available():
        rows = [(term.name, str(term.value), term.source) for term in TERMS.values()]
        write(
            form, [dict(zip(_COLUMNS, row, strict=True)) for row in rows], "terms", _COLUMNS, rows
        )
        Console(stderr=True, markup=False).print(
            "No GPU is here, so nothing was measured and nothing was written: these are the terms "
            "that estimates use.",
            highlight=False,
        )
        raise typer.Exit(1)
    profile = measured()
    profile.save(out)
    rows = [(term.name, str(term.value), term.source) for term in profile.terms.values()]
    write(form, [dict(zip(_COLUMNS, row, strict=True)) for row in rows], "measured", _COLUMNS, rows)


def measured() -> "Profile":
    """Measure the terms on the first GPU that torch shows; some seconds.

    The context is what NVML counts for this process beside torch's reserved bytes; a cuBLAS
    workspace is what the first product of matrices leaves allocated.

    Raises
    ------
    ConfigError
        If NVML does not tell the memory of this process.
    """
    import torch

    from rankfit.estimator.calibration import Profile, Term

    properties = torch.cuda.get_device_properties(0)
    matrix = torch.ones(512, 512, device="cuda")
    before = torch.cuda.memory_allocated()
    product = matrix @ matrix
    torch.cuda.synchronize()
    workspace = torch.cuda.memory_allocated() - before - product.untyped_storage().nbytes()
    context = _process_bytes(f"GPU-{properties.uuid}") - torch.cuda.memory_reserved()
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    source = f"measured by rankfit calibrate on {today}, torch {torch.__version__}"
    name = "cublas-workspace-sm90" if properties.major == 9 else "cublas-workspace"
    terms = {
        name: Term(name, max(0, workspace), source),
        "cuda-context": Term("cuda-context", max(0, context), source),
    }
    capability = f"{properties.major}.{properties.minor}"
    return Profile(properties.name, capability, terms)


def _process_bytes(uuid: str) -> int:
    """Bytes of the GPU that NVML counts for this process."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
    finally:
        pynvml.nvmlShutdown()
    raise ConfigError(
        "NVML does not tell what this process holds of the GPU (a container without the host's "
        "process ids, or WSL): run rankfit calibrate outside of it"
    )
