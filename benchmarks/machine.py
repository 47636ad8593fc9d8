"""The JSON record of a benchmark: where it ran, and its figures as a person can read them."""

import json
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
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


def write_record(path: Path, record: object) -> None:
    """Write a record as JSON: what fits on a line is on one, numbers have six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(_rounded(record), 0) + "\n", encoding="utf-8")


def write_table(document: Path, name: str, lines: Iterable[str]) -> None:
    """Put lines into a document of the repository, between ``<!-- name -->`` and ``<!-- end -->``.

    Raises
    ------
    ValueError
        If the document has no such place.
    """
    before, mark, rest = document.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (mark and end):
        raise ValueError(f"{document} has no place '<!-- {name} -->' … '<!-- end -->'")
    document.write_text(before + mark + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value


def _text(value: object, indent: int) -> str:
    """JSON of a value that begins ``indent`` characters into a line of at most 110."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= 110 or not isinstance(value, dict | list):
        return line
    inner = indent + 1
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_text(each, inner)}" for key, each in value.items()]
    else:
        parts = [_text(each, inner) for each in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    pad = "\n" + " " * inner
    return opening + pad + f",{pad}".join(parts) + "\n" + " " * indent + closing
