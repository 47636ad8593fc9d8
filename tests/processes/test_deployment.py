"""TLS and node keys on real processes: registered nodes answer, others are refused.

The app is a few lines without torch, so that this tests the deployment alone.
"""

import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes.deployment import (
    MARK,
    Deployment,
    DeploymentError,
    Process,
    deployment,
    free_port,
    make_credentials,
    marked,
)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="needs openssl and ssh-keygen",
    ),
]

PYPROJECT = """
    [project]
    name = "roll-call"
    version = "0.1.0"
    license = "Apache-2.0"
    dependencies = []

    [tool.flwr.app]
    publisher = "tests"

    [tool.flwr.app.components]
    serverapp = "roll_call.server:app"
    clientapp = "roll_call.client:app"

    [tool.flwr.app.config]
    nodes = 2
    output = ""
    """
CLIENT = """
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()


    @app.query("roll_call")
    def answer(message: Message, context: Context) -> Message:
        record = ConfigRecord(dict(context.node_config))
        return Message(RecordDict({"node": record}), reply_to=message)
    """
SERVER = """
    import json
    import time
    from pathlib import Path

    from flwr.app import Context, Message, RecordDict
    from flwr.serverapp import Grid, ServerApp

    app = ServerApp()


    @app.main()
    def main(grid: Grid, context: Context) -> None:
        wanted = context.run_config["nodes"]
        while len(ids := list(grid.get_node_ids())) < wanted:
            time.sleep(0.5)
        messages = [
            Message(RecordDict(), dst_node_id=node, message_type="query.roll_call") for node in ids
        ]
        replies = {
            str(reply.metadata.src_node_id): dict(reply.content["node"])
            for reply in grid.send_and_receive(messages, timeout=120)
        }
        Path(context.run_config["output"]).write_text(json.dumps(replies))
    """


def write_app(folder: Path) -> Path:
    package = folder / "roll_call"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(textwrap.dedent(PYPROJECT))
    (package / "__init__.py").write_text("")
    (package / "client.py").write_text(textwrap.dedent(CLIENT))
    (package / "server.py").write_text(textwrap.dedent(SERVER))
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("deployment")) as started:
        yield started


def start_strangers(running: Deployment) -> dict[str, Process]:
    """SuperNodes that must be refused, by the words in which they say so."""
    running.make_key("unregistered")
    other = running.folder / "other"
    make_credentials(other)
    key = f"--auth-supernode-private-key={running.credentials / 'unregistered'}"
    authority = f"--root-certificates={running.credentials / 'ca.crt'}"
    flags = {
        "Failed to activate SuperNode": (authority, key),
        "SuperNode authentication is enabled": (authority,),
        "CERTIFICATE_VERIFY_FAILED": (f"--root-certificates={other / 'ca.crt'}", key),
        "Connection attempt failed": ("--insecure", "--max-retries=1"),
    }
    address = f"--superlink=127.0.0.1:{running.port}"
    return {
        words: running.start(
            f"stranger-{number}", "flower-supernode", address, f"--port={free_port()}", *more
        )
        for number, (words, more) in enumerate(flags.items())
    }


def test_registered_nodes_answer_and_strangers_are_refused(
    running: Deployment, tmp_path: Path
) -> None:
    ids = {running.register(name) for name in ("node-1", "node-2")}
    running.start_supernode("node-1", 'client-name="one" memory-mib=512')
    running.start_supernode("node-2", 'client-name="two" upload-mbps=7.5')
    strangers = start_strangers(running)
    running.wait_online(2)

    output = tmp_path / "replies.json"
    done = running.run(write_app(tmp_path / "app"), "--run-config", f'output="{output}"')
    assert done.status == "finished:completed", done.log
    replies = json.loads(output.read_text())
    assert {int(node) for node in replies} == ids
    assert {"client-name": "one", "memory-mib": 512} in replies.values()
    assert {"client-name": "two", "upload-mbps": 7.5} in replies.values()

    for words, stranger in strangers.items():
        stranger.popen.wait(60)
        assert stranger.popen.returncode != 0 and words in stranger.text(), stranger.text()
    assert set(map(int, running.nodes())) == ids


def test_a_user_without_the_authority_trusts_nothing(running: Deployment) -> None:
    home = running.folder / "no-authority"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.deployment]\naddress = "127.0.0.1:{running.port}"\n'
    )
    environment = {**running.environment, "FLWR_HOME": str(home)}
    untrusting = Deployment(running.folder, running.port, environment)
    with pytest.raises(DeploymentError, match="SuperLink is unavailable"):
        untrusting.nodes()


def test_nothing_is_left_when_a_deployment_ends(tmp_path: Path) -> None:
    with deployment(tmp_path / "short") as short:
        mark = short.environment[MARK]
        short.register("node")
        node = short.start_supernode("node")
        short.wait_online(1)
        assert len(marked(mark)) >= 2
        short.stop(node)
        assert not psutil.pid_exists(node.popen.pid)
        assert marked(mark)  # the SuperLink goes on
    assert marked(mark) == []
