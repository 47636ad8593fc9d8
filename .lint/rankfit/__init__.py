"""RankFit: heterogeneous-rank LoRA fine-tuning across machines, on Flower.

The packages ``adapters``, ``client``, ``server``, … lie at the top level of the repository, where a
Flower bundle expects them, and are imported as ``rankfit.adapters`` and so on. In a checkout or a
bundle this file adds the repository root to the package path; in the wheel they lie inside.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file():
    __path__.append(str(_ROOT))

#: Public names and the modules that define them; imported on first use, so that
#: ``import rankfit`` costs no torch.
_PUBLIC = {
    "RunSettings": "rankfit.configs.settings",
    "compose": "rankfit.configs.compose",
    "DeviceReport": "rankfit.estimator.report",
    "Adapter": "rankfit.adapters.state",
    "run": "rankfit.cli.api",
}

__all__ = ["DeviceReport", "RunSettings", "__version__", "compose", "run"]


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rankfit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
