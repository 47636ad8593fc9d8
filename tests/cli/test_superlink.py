"""A simulation's SuperLink answers its own user alone; Ctrl-C says what becomes of a run."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from rankfit.cli.flower import free_ports
from rankfit.cli.superlink import OwnUserOnly
from rankfit.estimator import native_allocator as native


async def hello(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def port() -> Iterator[int]:
    (port,) = free_ports(1)
    config = uvicorn.Config(OwnUserOnly(hello), "127.0.0.1", port, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port
    server.should_exit = True
    thread.join()


def get(port: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_connection_of_another_user_is_refused(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(port) == 200
    if os.getuid() == 0:  # who may, becomes another user
        child = os.fork()
        if child == 0:
            status = 0
            try:
                os.setuid(65534)
                status = get(port) // 100
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    own = os.getuid()
    monkeypatch.setattr("rankfit.cli.superlink.os.getuid", lambda: own + 1)
    assert get(port) == 403


_RUN = """
import sys
from pathlib import Path
from rankfit.cli import flower, main
from rankfit.configs.compose import compose
flower.flower_command = lambda name: sys.argv[1]
flower._SECOND_SECONDS = float(sys.argv[2])
settings = compose(["quickstart", "run.directory=/runs"])
environment = {"PATH": "/bin:/usr/bin"}
main.app = lambda: flower.run_app(Path("."), settings, environment, sys.argv[3] or None)
main.main()
"""
_FLWR = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
  run) echo "Successfully started run 42"; exec sleep 60;;
  *) exit 0;;
esac
"""


@pytest.mark.parametrize(
    ("presses", "superlink", "says", "stops"),
    [
        (1, "far", "run 42 goes on at far: `flwr log 42 far --stream` shows it", False),
        (2, "far", "run 42 is stopped; go on with `rankfit resume /runs/quickstart", True),
        (1, "", "stopped; go on with `rankfit resume /runs/quickstart`", False),
    ],
)
def test_what_ctrl_c_does(
    presses: int, superlink: str, says: str, stops: bool, tmp_path: Path
) -> None:
    log, flwr = tmp_path / "log", tmp_path / "flwr"
    flwr.write_text(_FLWR.format(log=log))
    flwr.chmod(0o755)
    seconds = "60" if presses > 1 else "0.1"
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(flwr), seconds, superlink],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would this child of it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        assert "started run 42" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        if presses > 1:
            asked = ""
            while "Ctrl-C again stops it" not in asked:
                read = process.stderr.read(1)
                assert read, f"it ended without asking: {asked}"
                asked += read
            process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert says in " ".join(shown.split()) and process.returncode == 130
    assert ("stop 42 far" in log.read_text()) is stops


def test_a_library_that_others_could_have_put_there_is_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "native" / "replay.so"
    assert not native._own(file)
    file.parent.mkdir(mode=0o700)
    file.write_bytes(b"")
    file.chmod(0o700)
    assert native._own(file)
    for place, mode in ((file, 0o722), (file.parent, 0o770)):
        before = place.stat().st_mode
        place.chmod(mode)
        assert not native._own(file)  # it is made anew
        place.chmod(before)
    other = tmp_path / "other.so"
    other.write_bytes(b"")
    file.unlink()
    file.symlink_to(other)
    with pytest.raises(OSError, match="not this user's own"):
        native._own(file)
    if os.getuid() == 0:
        file.unlink()
        file.write_bytes(b"")
        os.chown(file, 65534, 65534)
        with pytest.raises(OSError, match="not this user's own"):
            native._own(file)
