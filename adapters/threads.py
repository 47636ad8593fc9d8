"""How many threads numerical work uses, whichever library does it.

PyTorch computes with MKL and OpenMP; NumPy and SciPy each bring an OpenBLAS with threads of its
own, which :func:`torch.set_num_threads` does not reach and which spin while they wait: on cores
that other processes use, a small decomposition then takes many times as long. So each decomposition
is made by one thread, and independent ones run side by side; a result then does not depend on the
number of threads.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, within the CPU quota of its cgroups.

    A quota of one and a half cores counts as one: a thread more would be stopped for part of every
    period, and the others would wait for it.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` lie; another folder in tests.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _cgroup_quotas(root))]))


def _cgroup_quotas(root: Path) -> list[float]:
    """Cores of every limited cgroup (v1 and v2) from this process's up to the root.

    A container often sees its own cgroup as the root while ``/proc/self/cgroup`` names the host's
    path: folders that do not exist are passed over, and the root is always read.
    """
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0":
            bases, quota_of = [root / "sys/fs/cgroup"], _quota_v2
        elif "cpu" in controllers.split(","):
            # The folder has the name of the controllers that are mounted together.
            bases = [root / "sys/fs/cgroup" / folder for folder in (controllers, "cpu")]
            quota_of = _quota_v1
        else:
            continue
        for base in bases:
            group = base / name.strip("/")
            for level in (group, *group.parents):
                quota = quota_of(level)
                if quota is not None:
                    quotas.append(quota)
                if level == base:
                    break
    return quotas


def _quota_v2(level: Path) -> float | None:
    """``cpu.max`` is "quota period" in microseconds, or "max period"."""
    return _share(*(_text(level / "cpu.max").split() or ("", "")))


def _quota_v1(level: Path) -> float | None:
    """``cpu.cfs_quota_us`` is -1 where there is no limit."""
    return _share(_text(level / "cpu.cfs_quota_us"), _text(level / "cpu.cfs_period_us"))


def _share(quota: str, period: str = "100000") -> float | None:
    quota, period = quota.strip(), period.strip()
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _text(path: Path) -> str:
    """Content of a kernel file; nothing if it is absent or not readable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def limit_process(threads: int) -> None:
    """Set the threads of all numerical work of this process, for a process that is ours alone.

    Parameters
    ----------
    threads : int
        Wanted threads; never more than :func:`usable_cores` are used.
    """
    allowed = min(threads, usable_cores())
    torch.set_num_threads(allowed)
    _openblas().limit(limits=allowed)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread within the block, and as before after it; blocks may overlap.

    PyTorch's number belongs to the calling thread. OpenBLAS's belongs to the process, so that it is
    put back when the last of the blocks that overlap ends.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _openblas_limit.enter()
    try:
        yield
    finally:
        _openblas_limit.leave()
        torch.set_num_threads(before)


def in_threads(
    act: Callable[[_Item], _Result], items: Sequence[_Item], threads: int = 0
) -> list[_Result]:
    """``[act(item) for item in items]``, side by side, each computed by one thread.

    Parameters
    ----------
    act : Callable
        What is done with an item.
    items : Sequence
        The items, in the order of the results.
    threads : int
        How many run at once, at most :func:`usable_cores`; 0 = as many as those.
    """
    cores = usable_cores()
    threads = min(threads or cores, cores, len(items))
    with one_thread():
        if threads <= 1:
            return [act(item) for item in items]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(act, items))


class _OpenBlasLimit:
    """One thread for OpenBLAS as long as anybody asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limiter: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limiter = _openblas().limit(limits=1)
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limiter.restore_original_limits()


_openblas_limit = _OpenBlasLimit()


@lru_cache(maxsize=1)
def _openblas() -> ThreadpoolController:
    """NumPy's and SciPy's BLAS; finding the libraries takes milliseconds, so it is done once."""
    import scipy.linalg  # noqa: F401, PLC0415 - loads both

    return ThreadpoolController().select(user_api="blas")
