"""Processes by their id and start time, so that a number that was given again is no mistake."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Watched:
    """A process.

    Attributes
    ----------
    pid : int
        Its id.
    started : int
        When it started, in the kernel's clock ticks since boot (0 = the system does not tell).
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Watched":
        """The process that has this id now, or had it: see :meth:`alive`."""
        return cls(pid, _stat(pid)[1])

    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        if self.pid <= 0:
            return False
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            pass  # it is there, under another user
        except OSError:
            return False
        state, started = _stat(self.pid)
        return state not in ("Z", "X") and started == self.started


def _stat(pid: int) -> tuple[str, int]:
    """State and start time from ``/proc``; ("", 0) where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return fields[0], int(fields[19])
