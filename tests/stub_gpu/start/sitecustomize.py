"""Computes on the stub GPU in every process that is started with this folder on PYTHONPATH.

``STUB_GPU_COMPUTE`` says what: "integers" (the default), "all" or "nothing" (computing.py). It
begins when torch is imported, and in every thread that starts later.
"""

import importlib.abc
import importlib.util
import os
import sys
import threading
from pathlib import Path


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets torch be imported as it is, and then switches computing on."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        _begin()


def _begin():
    """Compute in this thread, and in those that start from now on."""
    where = Path(__file__).resolve().parents[1] / "computing.py"
    spec = importlib.util.spec_from_file_location("stub_gpu_computing", where)
    computing = sys.modules["stub_gpu_computing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(computing)
    computing.Computing(_WHAT).__enter__()
    run = threading.Thread.run

    def computing_run(self):
        with computing.Computing(_WHAT):
            run(self)

    threading.Thread.run = computing_run


_WHAT = os.environ.get("STUB_GPU_COMPUTE", "integers")
if _WHAT in ("integers", "all"):
    sys.meta_path.insert(0, _AfterTorch())
elif _WHAT != "nothing":
    raise SystemExit(f"STUB_GPU_COMPUTE is {_WHAT!r}; expected integers, all or nothing")
