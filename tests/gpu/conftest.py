"""Tests on stub GPUs, started by `make test-gpu`; others have no GPU to run them on."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stub_gpu.gpu import Gpu, environment, run

if "STUB_GPU_STATE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

On = Callable[..., str]


@pytest.fixture
def on(tmp_path: Path) -> On:
    """Runs a program on stub GPUs in a process of its own, and returns what it printed."""

    def start(program: str, *gpus: Gpu, compute: str = "integers", **variables: str) -> str:
        environ = environment(tmp_path / "state", *gpus, compute=compute) | variables
        return run(environ, "-c", program)

    return start
