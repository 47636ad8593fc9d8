"""What the host has: its processor and the memory that its cgroup leaves it. Standard library."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Bytes of one memory: physical, free now, and held by the driver."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int = 0


@dataclass(frozen=True)
class _CgroupFiles:
    """Where one version of cgroups writes limit and use, and its name for cache to drop."""

    folder: str
    limit: str
    used: str
    cache: str


_V1 = _CgroupFiles(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_V2 = _CgroupFiles("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def host_memory(root: Path = Path("/")) -> Memory:
    """RAM of the host: ``/proc/meminfo`` within the limits of the cgroup (v2 or v1).

    Available memory is counted as the kernel does: page cache that can be dropped is available,
    both for the host (``MemAvailable``) and for a cgroup (``inactive_file``). Systems without
    ``/proc/meminfo`` are asked through :func:`os.sysconf`.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` lie; another folder in tests.

    Raises
    ------
    OSError
        If neither source knows the size of the memory.
    """
    total, available = _meminfo(root / "proc/meminfo") or _sysconf()
    for limit, used in _cgroup_levels(root):
        total = min(total, limit)
        available = min(available, limit - used)
    return Memory(total, min(max(available, 0), total))


def processor_name(root: Path = Path("/")) -> str:
    """Product name of the processor, or its architecture where the kernel does not name it."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "processor"


def _lines(path: Path) -> list[str]:
    """Lines of a kernel file; none if it is absent or not readable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _meminfo(path: Path) -> tuple[int, int] | None:
    """Total and available bytes; kernels before 3.14 have no ``MemAvailable``."""
    table = _table(path)
    if not table.get("MemTotal"):
        return None
    available = table.get("MemAvailable")
    if available is None:
        available = table.get("MemFree", 0) + table.get("Buffers", 0) + table.get("Cached", 0)
    return table["MemTotal"] * 1024, available * 1024


def _table(path: Path) -> dict[str, int]:
    """``key value`` or ``key: value kB`` lines as numbers."""
    fields = (line.replace(":", " ").split() for line in _lines(path))
    return {field[0]: int(field[1]) for field in fields if len(field) >= 2 and field[1].isdecimal()}


def _sysconf() -> tuple[int, int]:
    """Total and available bytes from POSIX; macOS does not tell the available ones."""
    try:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError) as error:
        raise OSError(
            f"the size of the memory is not known ({error}); expected /proc/meminfo or "
            "sysconf(SC_PHYS_PAGES); declare it: --node-config 'memory-mib=4096'"
        ) from error
    try:
        available = os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        available = pages
    return page * pages, page * available


def _cgroup_levels(root: Path) -> list[tuple[int, int]]:
    """Limit and used bytes of every limited cgroup from this process's up to the root.

    A container often sees its own cgroup as the root while ``/proc/self/cgroup`` names the host's
    path: folders that do not exist are passed over, and the root is always read.
    """
    levels = []
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        files = _V2 if number == "0" else _V1
        base = root / files.folder
        group = base / name.strip("/")
        for level in (group, *group.parents):
            limit = "".join(_lines(level / files.limit)).strip()
            if limit.isdecimal():  # v2 writes "max" where there is no limit
                used = "".join(_lines(level / files.used)).strip()
                cache = _table(level / "memory.stat").get(files.cache, 0)
                levels.append((int(limit), max(int(used or 0) - cache, 0)))
            if level == base:
                break
    return levels
