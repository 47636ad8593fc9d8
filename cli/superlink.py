"""Flower's SuperLink for one user of this machine: its ports answer nobody else.

A simulation's SuperLink listens on loopback without credentials, which every user of the machine
can reach, and whoever submits a run there runs code as its owner. Flower 1.41 has accounts by OIDC
only. So each request's connection is looked up in the kernel's table, which knows whose it is.
"""

import logging
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from functools import wraps
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_TABLE = Path("/proc/net/tcp")
#: An open connection; others have lost their owner, and show the administrator's id.
_ESTABLISHED = "01"


class OwnUserOnly:
    """ASGI middleware that answers 403 to connections of other users of this machine."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on what is this user's own; see ASGI."""
        if scope["type"] == "lifespan" or _owner(scope) == os.getuid():
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send(
                {"type": "http.response.body", "body": b"this SuperLink is another user's\n"}
            )


def _owner(scope: Scope) -> int | None:
    """User whose process holds the other end of a connection; None if the kernel knows none."""
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return None
    ends = (_written(*client), _written(*server))
    for line in _TABLE.read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if (fields[1], fields[2]) == ends and fields[3] == _ESTABLISHED:
            return int(fields[7])
    return None


def _written(host: str, port: int) -> str:
    """An IPv4 address as the kernel's table has it."""
    number = int.from_bytes(bytes(int(part) for part in host.split(".")), sys.byteorder)
    return f"{number:08X}:{port:04X}"


def main() -> None:
    """``flower-superlink``, for this user alone where the kernel tells whose a connection is."""
    import uvicorn
    from flwr.superlink.cli.flower_superlink import flower_superlink

    if _TABLE.exists():
        serve = uvicorn.run

        @wraps(serve)
        def guarded(app: Any, **options: Any) -> None:
            serve(OwnUserOnly(app), **options)

        uvicorn.run = guarded
    else:
        log.warning("the ports of this SuperLink answer every user of this machine")
    flower_superlink()


if __name__ == "__main__":
    main()
