"""Running the app through Flower's own command, on a SuperLink of one's own or a given one."""

import itertools
import json
import logging
import math
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import tomli_w

import rankfit
from rankfit.configs.settings import TERMINAL_WIDTH, RunSettings, to_flat


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


log = logging.getLogger(__name__)

#: What Flower needs where there is no network; a user's own setting wins.
OFFLINE = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_START_SECONDS = 60.0
#: Colours that Flower and Ray write wherever their lines go.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
#: Without a terminal, a second Ctrl-C within this time stops the run.
_SECOND_SECONDS = 5.0
#: In the environment of everything that a simulation starts.
_MARK = "RANKFIT_SIMULATION"


class FlowerError(RuntimeError):
    """Flower could not be started, or the run failed."""


def environment(threads: int) -> dict[str, str]:
    """Environment of Flower's processes: what is set already wins over the defaults."""
    # OMP_NUM_THREADS must be set before torch is imported: two processes with two threads each
    # are five times slower on two cores than with one.
    own = OFFLINE | {"OMP_NUM_THREADS": str(threads)}
    if sys.stdout.isatty():
        # The server has no terminal to ask.
        own[TERMINAL_WIDTH] = str(shutil.get_terminal_size().columns)
    return own | dict(os.environ)


def commands_first(env: Mapping[str, str]) -> dict[str, str]:
    """Environment in which Flower finds the commands of this Python environment.

    Its processes start one another by bare name (the SuperLink ``flower-superexec``), which is not
    found where the virtual environment is used by path and never activated, as ``make`` does.
    """
    beside = str(Path(sys.executable).parent)
    return dict(env) | {"PATH": os.pathsep.join([beside, env.get("PATH", os.defpath)])}


def flower_command(name: str) -> str:
    """Path of one of Flower's commands, first of this Python environment.

    Raises
    ------
    FlowerError
        If it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FlowerError(f"{name} is not installed beside {sys.executable}; pip install flwr")
    return found


@contextmanager
def app_directory() -> Iterator[Path]:
    """Folder with the Flower app: the checkout itself, or one laid out from the wheel."""
    package = Path(rankfit.__file__).resolve().parent
    if (package.parent / "pyproject.toml").is_file():
        yield package.parent
        return
    with tempfile.TemporaryDirectory(prefix="rankfit-app-") as folder:
        root = Path(folder)
        skipped = shutil.ignore_patterns("__pycache__")
        (root / "rankfit").mkdir()
        for module in package.glob("*.py"):
            shutil.copy(module, root / "rankfit")
        for part in package.iterdir():
            if part.is_dir() and part.name != "__pycache__":
                shutil.copytree(part, root / part.name, ignore=skipped)
        app = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
        del app["tool"]["flwr"]["app"]["fab-exclude"]  # folders that a wheel does not have
        (root / "pyproject.toml").write_text(tomli_w.dumps(app), encoding="utf-8")
        yield root


@contextmanager
def local_superlink(env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Run a SuperLink in simulation mode on free ports of 127.0.0.1 until the block ends.

    Yields
    ------
    dict[str, str]
        The environment in which ``flwr`` finds it as its default connection.

    Raises
    ------
    FlowerError
        If it does not come up; the message ends with its log.
    """
    with tempfile.TemporaryDirectory(prefix="rankfit-flwr-") as folder:
        port, control = free_ports(2)
        own = commands_first(env) | {"FLWR_HOME": folder, _MARK: folder}
        # Ray's ports are open to other users of the machine: only who has this environment may act.
        own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        connection = {"address": f"127.0.0.1:{port}", "insecure": True}
        config = {"superlink": {"default": "own", "own": connection}}
        (Path(folder) / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        log_file = Path(folder) / "superlink.log"
        command = [
            sys.executable, "-m", "rankfit.cli.superlink", "--insecure", "--simulation",
            "--host", "127.0.0.1", "--port", str(port),
            "--control-api-address", f"127.0.0.1:{control}",
        ]  # fmt: skip
        with log_file.open("wb") as out:
            process = subprocess.Popen(
                command, env=own, stdout=out, stderr=out, cwd=folder, start_new_session=True
            )
        try:
            _await_health(process, port, log_file)
            yield own
        finally:
            end_marked(_MARK, folder, grace=10.0)
            process.wait()


class Interrupted(FlowerError):
    """The user pressed Ctrl-C; the message says what became of the run."""


def run_app(
    app: Path, settings: RunSettings, env: Mapping[str, str], superlink: str | None
) -> None:
    """Submit a run with ``flwr run``, show its log, and wait for its end.

    Parameters
    ----------
    superlink : str or None
        Name of a SuperLink connection of the user's; None = a simulation.

    Raises
    ------
    Interrupted
        After Ctrl-C: a simulation ends; about a run on the user's SuperLink it is asked.
    FlowerError
        If it could not be submitted, or finished other than ``completed`` (``flwr run --stream``
        itself exits 0 then).
    """
    with tempfile.TemporaryDirectory(prefix="rankfit-run-") as folder:
        file = Path(folder) / "run.toml"
        file.write_text(tomli_w.dumps(dict(to_flat(settings))), encoding="utf-8")
        command = [flower_command("flwr"), "run", str(app)]
        command += [superlink] if superlink else []
        command += ["--run-config", str(file), "--stream"]
        if superlink is None:
            command += ["--federation-config", federation_config(settings)]
        run_id = _stream(command, env, superlink, _come_back(settings, superlink))
    status = _status(run_id, env, superlink)
    if status != "finished:completed":
        raise FlowerError(
            f"the Flower run {run_id} ended as {status!r}; the reason is in the log above"
        )


def federation_config(settings: RunSettings) -> str:
    """Size of a simulation, as ``flwr run --federation-config`` takes it."""
    size = settings.simulation
    return (
        f"num-supernodes={size.clients} client-resources-num-cpus={size.cpus_per_client:g} "
        f"client-resources-num-gpus={size.gpus_per_client}"
    )


def free_ports(count: int) -> list[int]:
    """Return different TCP ports of 127.0.0.1 that are free now."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _come_back(settings: RunSettings, superlink: str | None) -> str:
    """The command that continues a run that was stopped."""
    folder = Path(settings.run.directory) / settings.run.name
    return f"rankfit resume {folder}" + (f" --superlink {superlink}" if superlink else "")


def _stream(
    command: list[str], env: Mapping[str, str], superlink: str | None, come_back: str
) -> str:
    """Run a command, show its lines as they come, and find the run's id in them."""
    run_id = None
    # In a session of its own: Ctrl-C is for this process, which asks what it is to do.
    process = subprocess.Popen(
        command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with _ctrl_c() as pressed_again:
        try:
            for line in process.stdout:
                match = re.search(r"Successfully started run (\d+)", line)
                run_id = match.group(1) if match else run_id  # known before anybody can react to it
                sys.stdout.write(line if sys.stdout.isatty() else _COLOUR.sub("", line))
                sys.stdout.flush()
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            said = _interrupted(run_id, env, superlink, come_back, pressed_again)
            raise Interrupted(said) from None
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if run_id is None:
        raise FlowerError(f"`flwr run` could not submit the run (exit code {code}); see above")
    return run_id


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Raise ``KeyboardInterrupt`` at the first Ctrl-C only; a later one sets the event.

    An exception may come between any two lines, also while the user is being asked what the first
    one meant, and would then end the command with a traceback and the run's fate unknown.
    """
    again = threading.Event()
    presses = itertools.count()

    def press(*_: object) -> None:
        if next(presses) == 0:
            raise KeyboardInterrupt
        again.set()

    if threading.current_thread() is not threading.main_thread():
        yield again  # Python gives signals to the main thread alone
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield again
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(
    run_id: str | None,
    env: Mapping[str, str],
    superlink: str | None,
    come_back: str,
    pressed_again: threading.Event,
) -> str:
    """Do what the user wants of a run after Ctrl-C, and say what that was."""
    if superlink is None:
        return f"stopped; go on with `{come_back}`"
    if run_id is None:
        return f"the run may have been submitted: see `flwr list {superlink}`"
    if not _wants_to_stop(run_id, pressed_again):
        return (
            f"run {run_id} goes on at {superlink}: `flwr log {run_id} {superlink} --stream` shows "
            f"it, `flwr stop {run_id} {superlink}` stops it"
        )
    command = [flower_command("flwr"), "stop", run_id, superlink]
    done = subprocess.run(
        command, env=dict(env), capture_output=True, text=True, check=False,
        start_new_session=True,  # one more Ctrl-C does not cut the stopping short
    )  # fmt: skip
    if done.returncode:
        return f"run {run_id} could not be stopped: {(done.stdout + done.stderr).strip()}"
    return f"run {run_id} is stopped; go on with `{come_back}`"


def _wants_to_stop(run_id: str, pressed_again: threading.Event) -> bool:
    """Ask; a second Ctrl-C means yes, as does one within some seconds where nobody can answer."""
    question = f"Run {run_id} is under way. Stop it? [y/N; Ctrl-C again stops it] "
    sys.stderr.write(f"\n{question}")
    sys.stderr.flush()
    can_answer = sys.stdin is not None and sys.stdin.isatty()
    deadline = time.monotonic() + (math.inf if can_answer else _SECOND_SECONDS)
    answer = ""
    while not pressed_again.wait(0.1) and time.monotonic() < deadline and not answer:
        if can_answer and select.select([sys.stdin], [], [], 0)[0]:
            answer = sys.stdin.readline() or "no"
    sys.stderr.write("\n")
    return pressed_again.is_set() or answer.strip().lower() in ("y", "yes")


def _status(run_id: str, env: Mapping[str, str], superlink: str | None) -> str:
    """Return the final status of a run; it may lag behind the end of the log by a moment."""
    command = [flower_command("flwr"), "list", *([superlink] if superlink else [])]
    command += ["--run-id", run_id, "--format", "json"]
    status = "unknown"
    for _ in range(20):
        answer = subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False)
        match = re.search(r"\{.*\}", answer.stdout, re.DOTALL)
        runs = json.loads(match.group(0)).get("runs", []) if match else []
        status = str(runs[0]["status"]) if runs else status
        if status.startswith("finished"):
            break
        time.sleep(0.5)
    return status


def _await_health(process: "subprocess.Popen[bytes]", port: int, log_file: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-15:])
    raise FlowerError(f"the local SuperLink did not start on port {port}:\n{tail}")
