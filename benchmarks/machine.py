"""What a benchmark's record says of where it ran."""

import os
import platform
import time
from importlib.metadata import version
from typing import Any

from rankfit.client.host import host_memory, processor_name


def machine(*packages: str) -> dict[str, Any]:
    """Date, versions and hardware, for the JSON of a benchmark."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "hardware": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "memory-bytes": host_memory().total_bytes,
        },
    }
