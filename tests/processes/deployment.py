"""A real federation on this machine: a SuperLink and SuperNodes with TLS and registered node keys.

Every process runs on ports that were free, with a ``FLWR_HOME`` of its own, and is ended by its
id with all that it started. Flower detaches its workers into sessions of their own, so they are
known by a mark in their environment that they inherit.
"""

import json
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rankfit.cli import flower as processes
from rankfit.cli.flower import commands_first, end, end_marked

ROOT = Path(__file__).resolve().parents[2]
CONNECTION = "deployment"
MARK = "RANKFIT_TEST_DEPLOYMENT"

#: No network is asked for anything, and no proxy stands before 127.0.0.1.
ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "no_proxy": "127.0.0.1,localhost",
}


class DeploymentError(AssertionError):
    """A process did not do what a deployment needs; the message ends with its log."""


@dataclass(frozen=True)
class Process:
    """One started process and where its output goes."""

    name: str
    popen: "subprocess.Popen[bytes]"
    log: Path

    def text(self) -> str:
        """Its output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Run:
    """A finished ``flwr run``: its status (``finished:completed``) and its log."""

    run_id: int
    status: str
    log: str


@dataclass(frozen=True)
class Deployment:
    """A running SuperLink and what has been started around it; made by :func:`deployment`."""

    folder: Path
    port: int
    environment: Mapping[str, str]
    processes: list[Process] = field(default_factory=list)

    @property
    def credentials(self) -> Path:
        """Folder of certificates and keys."""
        return self.folder / "credentials"

    def start_superlink(self, *flags: str) -> Process:
        """Start the SuperLink, or start it again on the same port and database."""
        process = self.start(
            "superlink",
            "flower-superlink",
            "--host=127.0.0.1",
            f"--port={self.port}",
            f"--ssl-ca-certfile={self.credentials / 'ca.crt'}",
            f"--ssl-certfile={self.credentials / 'server.crt'}",
            f"--ssl-keyfile={self.credentials / 'server.key'}",
            "--enable-supernode-auth",
            f"--database={self.folder / 'superlink.db'}",
            "--disable-runtime-dependency-installation",
            *flags,
        )
        context = ssl.create_default_context(cafile=str(self.credentials / "ca.crt"))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

        def healthy() -> bool:
            if process.popen.poll() is not None:
                raise DeploymentError(f"the SuperLink ended:\n{process.text()[-3000:]}")
            try:
                with opener.open(f"https://127.0.0.1:{self.port}/health", timeout=2):
                    return True
            except (urllib.error.URLError, OSError):
                return False

        self.wait_for(healthy, "the SuperLink answers", process)
        return process

    def start_supernode(
        self,
        name: str,
        node_config: str = "",
        *flags: str,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a SuperNode with the key of this name; it may not be registered.

        Parameters
        ----------
        name : str
            Name of the key that :meth:`make_key` made, and of the log.
        node_config : str
            As on the command line: ``memory-mib=512 client-name="one"``.
        *flags : str
            Further flags of ``flower-supernode``.
        environment : Mapping[str, str], optional
            Added to the process's environment, for instance ``CUDA_VISIBLE_DEVICES``.
        """
        return self.start(
            name,
            "flower-supernode",
            f"--superlink=127.0.0.1:{self.port}",
            f"--port={free_port()}",
            f"--root-certificates={self.credentials / 'ca.crt'}",
            f"--auth-supernode-private-key={self.credentials / name}",
            *([f"--node-config={node_config}"] if node_config else []),
            *flags,
            environment=environment,
        )

    def start(
        self, name: str, program: str, *flags: str, environment: Mapping[str, str] | None = None
    ) -> Process:
        """Start one of this Python environment's commands; its output is ``name.log``."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            popen = subprocess.Popen(
                [command(program), *flags],
                cwd=self.folder,
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def make_key(self, name: str) -> Path:
        """Make a node key pair and return the public one."""
        make_credentials(self.credentials, name)
        return self.credentials / f"{name}.pub"

    def register(self, name: str) -> int:
        """Make a key and register it; returns the node id."""
        key = self.make_key(name)
        answer = self.flwr_json("supernode", "register", str(key), CONNECTION, "--name", name)
        return int(answer["node-id"])

    def nodes(self) -> dict[str, str]:
        """Status of every registered node (``online``, ``offline``, …), by node id."""
        answer = self.flwr_json("supernode", "list", CONNECTION)
        return {str(node["node-id"]): str(node["status"]) for node in answer["nodes"]}

    def wait_online(self, count: int, timeout: float = 240.0) -> None:
        """Wait until ``count`` nodes are online."""
        self.wait_for(
            lambda: list(self.nodes().values()).count("online") >= count,
            f"{count} SuperNodes are online",
            *self.processes,
            timeout=timeout,
        )

    def run(self, app: Path, *flags: str, timeout: float = 900.0) -> Run:
        """Submit an app with ``flwr run --stream``, follow it to its end."""
        done = self.flwr("run", str(app), CONNECTION, "--stream", *flags, timeout=timeout)
        started = re.search(r"Successfully started run (\d+)", done.stdout)
        if started is None:
            raise DeploymentError(f"flwr run submitted nothing:\n{done.stdout}{done.stderr}")
        run_id = int(started.group(1))
        status = "unknown"

        def finished() -> bool:
            nonlocal status
            status = self.status(run_id)
            return status.startswith("finished")

        self.wait_for(finished, f"run {run_id} finishes", *self.processes, timeout=timeout)
        return Run(run_id, status, done.stdout)

    def status(self, run_id: int) -> str:
        """Status of a run; ``flwr run`` itself exits 0 when the run failed."""
        answer = self.flwr_json("list", CONNECTION, "--run-id", str(run_id))
        return str(answer["runs"][0]["status"])

    def flwr(self, *arguments: str, timeout: float = 180.0) -> "subprocess.CompletedProcess[str]":
        """Run Flower's command line against this deployment."""
        return subprocess.run(
            [command("flwr"), *arguments],
            cwd=self.folder,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def flwr_json(self, *arguments: str) -> dict[str, Any]:
        """Answer of a ``flwr`` command as JSON; raises if it says that it failed."""
        done = self.flwr(*arguments, "--format", "json")
        found = re.search(r"\{.*\}", done.stdout, re.DOTALL)
        answer: dict[str, Any] = json.loads(found.group(0)) if found else {}
        if not answer.get("success"):
            raise DeploymentError(f"flwr {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
        return answer

    def wait_for(
        self,
        condition: Callable[[], bool],
        what: str,
        *watched: Process,
        timeout: float = 180.0,
    ) -> None:
        """Wait for a condition; fails with the watched processes' logs."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                remainders = "\n".join(f"--- {one.name}\n{one.text()[-3000:]}" for one in watched)
                raise DeploymentError(f"waited {timeout:g} s in vain: {what}\n{remainders}")
            time.sleep(0.3)

    def stop(self, process: Process, grace: float = 8.0) -> None:
        """End one process with all that it started; the rest of the deployment goes on."""
        tree = _tree(process.popen.pid)
        end(tree, grace)
        process.popen.wait(grace)
        if process in self.processes:
            self.processes.remove(process)

    def kill(self, process: Process) -> None:
        """Kill one process with all that it started, as a crash of its machine would."""
        for one in _tree(process.popen.pid):
            one.kill()
        process.popen.wait()
        if process in self.processes:
            self.processes.remove(process)

    def stop_all(self, grace: float = 8.0) -> None:
        """End everything that carries this deployment's mark."""
        mark = self.environment[MARK]
        end_marked(MARK, mark, grace)
        for process in self.processes:
            process.popen.wait(grace)
        self.processes.clear()


@contextmanager
def deployment(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Deployment]:
    """Start a SuperLink in ``folder`` and end all that was started when the block ends.

    Parameters
    ----------
    folder : Path
        Gets credentials, database, logs, and Flower's home; also the working directory.
    environment : Mapping[str, str], optional
        Added to the environment of every process.
    """
    home = folder / "flwr-home"
    home.mkdir(parents=True)
    port = free_port()
    make_credentials(folder / "credentials")
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\n'
        f'root-certificates = "{folder / "credentials" / "ca.crt"}"\n',
        encoding="utf-8",
    )
    own = {"FLWR_HOME": str(home), MARK: uuid.uuid4().hex}
    base = commands_first(os.environ)
    running = Deployment(folder, port, {**base, **ENVIRONMENT, **(environment or {}), **own})
    try:
        running.start_superlink()
        yield running
    finally:
        running.stop_all()


def make_credentials(folder: Path, *nodes: str) -> None:
    """Run docker/make-credentials.sh for this machine; files that exist are kept."""
    script = ROOT / "docker" / "make-credentials.sh"
    flags = [flag for node in nodes for flag in ("-n", node)]
    subprocess.run(
        [str(script), "-o", str(folder), *flags, "localhost"],
        check=True,
        capture_output=True,
        timeout=60,
    )


def command(name: str) -> str:
    """Path of a command of this Python environment."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free, and not among those that the kernel gives away."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def marked(mark: str) -> list[psutil.Process]:
    """Processes that carry a deployment's mark."""
    return processes.marked(MARK, mark)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
