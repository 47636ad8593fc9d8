"""Processes that a command started, found by a mark in their environment and ended by their id.

Flower detaches its workers into sessions of their own, and Ray its daemons, so neither a process
group nor the tree of parents holds all of them; the environment is what they all inherit.
"""

from collections.abc import Sequence

import psutil


def marked(variable: str, mark: str) -> list[psutil.Process]:
    """Processes of this user whose environment holds ``variable=mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def end_marked(variable: str, mark: str, grace: float) -> None:
    """End all marked processes, also those that the ending ones start meanwhile."""
    for _ in range(5):
        left = marked(variable, mark)
        if not left:
            return
        end(left, grace)


def end(processes: Sequence[psutil.Process], grace: float) -> None:
    """Terminate processes by id, and kill those that are still there after ``grace`` seconds."""
    left = list(processes)
    for act in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            try:
                act(process)
            except psutil.NoSuchProcess:
                continue
        _, left = psutil.wait_procs(left, timeout=grace)
