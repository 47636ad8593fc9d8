"""RankFit: heterogeneous-rank LoRA fine-tuning across machines, on Flower.

The folders ``server``, ``client``, ``strategies``, … lie at the top of the repository, where a
Flower bundle expects them, and are imported as ``rankfit.server`` and so on. In a checkout this
package has a link to each of them, so that every tool finds them; in the wheel they are folders of
it. A Flower bundle has no links, nor has a checkout on a file system without them: there, the path
is extended here.
"""

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what _PUBLIC names, for editors and type checkers
    from rankfit.adapters.adapter import Adapter as Adapter
    from rankfit.cli.api import run as run
    from rankfit.configs.compose import compose as compose
    from rankfit.configs.settings import RunSettings as RunSettings
    from rankfit.estimator.device_report import DeviceReport as DeviceReport

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
if not (_HERE / "configs").is_dir():
    __path__.append(str(_HERE.parent))

# CUDA numbers GPUs fastest first where nothing is said, NVML and Ray by their PCI bus: an index is
# to mean one GPU to all. It is read when CUDA is first used.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

# peft imports bitsandbytes wherever it is installed, and on processors with AVX-512 bf16 that
# recommends a package for 4-bit inference, in every process and before any message of ours.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

#: Public names and the modules that define them; imported on first use, so that
#: ``import rankfit`` costs no torch.
_PUBLIC = {
    "RunSettings": "rankfit.configs.settings",
    "compose": "rankfit.configs.compose",
    "DeviceReport": "rankfit.estimator.device_report",
    "Adapter": "rankfit.adapters.adapter",
    "run": "rankfit.cli.api",
}

__all__ = ["DeviceReport", "RunSettings", "__version__", "compose", "run"]


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rankfit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
