"""The lock of a run directory: one process writes it, and says who it is.

The kernel's lock on the file decides on one machine, and goes with its process however that ends.
Where a network's file system does not share it, the file itself tells: owner, host, process, and a
time that is renewed while the run lasts.
"""

import fcntl
import getpass
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from rankfit.configs.settings import ConfigError

log = logging.getLogger(__name__)

#: The file in the run directory.
NAME = "lock"
#: A lock of another host that was not renewed for so long is stale.
STALE_SECONDS = 300.0
_RENEW_SECONDS = 30.0


class RunLock:
    """Held from :meth:`take` to :meth:`release`.

    Parameters
    ----------
    folder : Path
        The run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._handle: int | None = None
        self._released = threading.Event()

    def take(self) -> None:
        """Take the lock; a stale one is taken over, with a line that says so.

        Raises
        ------
        ConfigError
            If another process writes this run; the message says which.
        """
        if self._handle is not None:
            return
        handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._claim(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        self._released.clear()
        threading.Thread(target=self._renew, args=(handle,), name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back; nothing to do if it is not held."""
        if self._handle is None:
            return
        self._released.set()
        os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None

    def _claim(self, handle: int) -> None:
        before = _read(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken(before) from None
        before = _read(handle)
        if before:
            age = time.time() - os.fstat(handle).st_mtime
            if before.get("host") != socket.gethostname() and age < STALE_SECONDS:
                raise self._taken(before)
            log.warning("%s: a stale lock is taken over, of %s", self._file.parent, _who(before))
        own = {
            "owner": _user(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(own).encode(), 0)

    def _taken(self, before: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"{self._file.parent} is being written by {_who(before)}: two runs would spoil it. "
            "Wait for that one, or stop it (`flwr list`, `flwr stop RUN_ID`); if it is surely "
            f"over, remove {self._file}"
        )

    def _renew(self, handle: int) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            try:
                os.utime(handle)
            except OSError:
                return


def _read(handle: int) -> dict[str, Any]:
    """Who holds or held the lock; {} if nobody does."""
    text = os.pread(handle, 4096, 0)
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError:
        found = {"owner": "a process that did not say which"}
    return found if isinstance(found, dict) else {}


def _who(record: dict[str, Any]) -> str:
    parts = [f"process {record.get('process', '?')}", f"of {record.get('owner', '?')}"]
    parts += [f"on {record.get('host', '?')}", f"since {record.get('since', '?')}"]
    return " ".join(parts)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in a container
        return str(os.getuid())
