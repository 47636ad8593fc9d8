"""What a node's owner does not allow is refused: one line at the node, a code at the server."""

import json
import logging
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from typer.testing import CliRunner

from rankfit.cli.main import app as command
from rankfit.client.app import app as client_app
from rankfit.client.policy import OWNER, Policy, PolicyError, everything
from rankfit.configs import protocol
from rankfit.configs.compose import compose
from rankfit.configs.settings import RunSettings, from_flat, to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.strategies import replies
from rankfit.strategies.replies import read_report
from rankfit.tasks.data import DataError, read_data

Node = dict[str, str | int | float | bool]


def run(*overrides: str) -> RunSettings:
    return compose(["quickstart", "simulation.clients=2", *overrides])


def refusals(policy: Policy, settings: RunSettings, data_path: str | None = None) -> list[str]:
    return [refusal.coded.code for refusal in policy.refusals(settings, data_path)]


def ask(node: Node, settings: RunSettings) -> Message:
    InProcessGrid(client_app, {}, [])  # messages are made within a run
    message = Message(RecordDict(), 5, protocol.QUERY)
    return client_app(message, Context(1, 5, node, RecordDict(), to_flat(settings)))


def code(node: Node, settings: RunSettings) -> str:
    reply = ask(node, settings)
    if not reply.has_error():
        return ""
    fault = replies.fault(reply)
    assert fault is not None
    return fault.code


SHARED: Node = {"partition-id": 0, "num-partitions": 2}


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("model.trust-remote-code=true", "policy-code"),
        ("model.source=/models/x", "policy-model"),
        ("model.source=../x", "policy-model"),
        ("model.source=config:/etc/model.json", "policy-model"),
        ("data.source=/etc", "policy-data"),
        ("data.source=~/.ssh", "policy-data"),
        ("data.source=../../home", "policy-data"),
        ("train.epochs=101", "policy-work"),
        ("train.steps=100001", "policy-work"),
    ],
)
def test_a_node_without_a_policy_refuses(
    override: str, refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("rankfit").propagate = True
    assert code(dict(SHARED), run()) == ""
    assert code(dict(SHARED), run(override)) == refused
    (line,) = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert f"[{refused}]" in line and "\n" not in line
    assert code({**SHARED, "policy": OWNER}, run(override)) == ""


def test_where_clients_keep_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = ("head.mode=local", "server.evaluate=clients")
    default = Policy()
    assert refusals(default, run(*local)) == []
    (tmp_path / "out").symlink_to("/")
    for place in (
        "run.directory=/root/.ssh", "run.name=../../x", "head.directory=/var", "run.directory=out",
    ):  # fmt: skip
        assert refusals(default, run(place)) == []  # nothing is kept there
        assert refusals(default, run(*local, place)) == ["policy-write"], place
    assert refusals(default, run("train.moments=kept", "run.name=../../x")) == ["policy-write"]
    allowed = Policy.model_validate({"write": {"folders": ["/var/rankfit"]}})
    assert refusals(allowed, run(*local)) == ["policy-write"]
    assert refusals(allowed, run(*local, "head.directory=/var/rankfit/heads")) == []
    assert refusals(allowed, run(*local, "head.directory=/var/rankfit/../x")) == ["policy-write"]


def test_a_policy_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(
        """
        figures = ["train-loss", "acc*"]
        [data]
        columns = ["text", "label"]
        sources = ["hub:org/*"]
        [model]
        sources = ["hub:google/*", "/models/*"]
        revisions = ["abc123"]
        [work]
        epochs = 2
        memory-mib = 512
        """
    )
    policy = Policy.read(file)
    asked = run("model.source=google/vit", "model.revision=abc123", "data.source=org/set")
    assert refusals(policy, asked) == []
    assert refusals(policy, run("model.source=google/vit", "data.source=org/set")) == [
        "policy-model"
    ]
    assert refusals(policy, run("data.source=org/set")) == ["policy-model"]
    assert refusals(policy, run("model.source=/models/a", "train.epochs=3")) == [
        "policy-data", "policy-work",
    ]  # fmt: skip
    assert refusals(policy, run("model.source=/models/../etc", "data.source=org/set")) == [
        "policy-model"
    ]
    assert refusals(policy, run("model.source=/models/a", "data.label-column=name"), "/d") == [
        "policy-columns"
    ]
    let_out = policy.let_out({"num-examples": 3, "train-loss": 1.0, "accuracy": 0.5, "steps": 2})
    assert let_out == {"num-examples": 3, "train-loss": 1.0, "accuracy": 0.5}
    assert Policy.model_validate(json.loads(json.dumps(policy.model_dump()))) == policy
    assert policy.memory_bytes == 512 * 2**20


@pytest.mark.parametrize(
    "text", ["texts = maybe", "[data]\nfolder = []", "[work]\nepochs = -1", "\xff", "[model"]
)
def test_a_policy_that_cannot_be_read_allows_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "policy.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(PolicyError, match="policy"):
        Policy.read(file)
    reply = ask({**SHARED, "policy": str(file)}, run())
    assert reply.error.reason == "rankfit node-policy"


def test_a_node_takes_its_part_of_a_shared_set_and_no_other() -> None:
    assert code({}, run()) == "node-partition"
    assert code({"partition-id": 0}, run()) == "node-partitions"
    assert code({"partition-id": 2, "num-partitions": 2}, run()) == "node-partitions"
    assert code({"partition-id": 1, "num-partitions": 2}, run()) == ""
    assert code({"data-path": "/data"}, run()) == ""
    assert code({"data-path": "/data"}, run("partition.kind=local")) == ""


def test_the_memory_of_a_policy_is_what_the_device_has(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("[work]\nmemory-mib = 3\n")
    for own, expected in (({}, 3), ({"memory-mib": 2}, 2), ({"memory-mib": 9}, 3)):
        reply = ask({**SHARED, **own, "policy": str(file)}, run("fleet.memory-mib="))
        report = read_report(reply)
        assert (report.free_bytes, report.source) == (expected * 2**20, "declared")
    with pytest.raises(Exception, match="work.memory-mib is 3"):
        Policy.read(file).check_plan(4 * 2**20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own = tmp_path / "own"
    own.mkdir()
    for place in (own, tmp_path):
        (place / "train.csv").write_text("text,label,secret\n" + "a,x,1\nb,y,2\nc,x,3\nd,y,4\n" * 4)
    return own


def read(folder: Path, policy: Policy, **data: str):
    flat = {"task.kind": "text-classification", "partition.kind": "local"}
    flat |= {"data.class-names": "x,y"} | {f"data.{key}": value for key, value in data.items()}
    access = policy.access(str(folder))
    return read_data(from_flat(flat), data_path=str(folder), access=access)


@pytest.mark.parametrize("pattern", ["../train.csv", "../*", "link.csv", "a/../../train.csv"])
def test_patterns_do_not_climb_out_of_a_node_s_folder(folder: Path, pattern: str) -> None:
    (folder / "link.csv").symlink_to(folder.parent / "train.csv")
    (folder / "a").mkdir()
    assert len(read(folder, Policy()).train) == 16
    with pytest.raises(DataError, match="none of the folders") as caught:
        read(folder, Policy(), train=pattern)
    assert caught.value.coded.code == "policy-data"
    assert len(read(folder, everything(), train=pattern).train) >= 16
    wider = Policy.model_validate({"data": {"folders": [str(folder.parent)]}})
    if ".." not in pattern:
        assert len(read(folder, wider, train=pattern).train) == 16
    with pytest.raises(DataError) as absolute:
        read(folder, Policy(), train=str(folder / "train.csv"))
    assert absolute.value.coded.code == "policy-data"


def test_other_columns_are_not_there(folder: Path) -> None:
    policy = Policy.model_validate({"data": {"columns": ["text", "la*"]}})
    assert len(read(folder, policy).train) == 16
    with pytest.raises(DataError, match="there is no column 'secret'; the columns are text, label"):
        read(folder, policy, **{"input-column": "secret"})


def test_rankfit_node_policy(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("[work]\nepochs = 2\nminutes = 5\n")
    runner, named = CliRunner(), ["node", "policy", "--policy", str(file), "quickstart"]
    fine = runner.invoke(command, named)
    assert fine.exit_code == 0 and "at most 5 minutes" in fine.output
    bad = runner.invoke(command, [*named, "train.epochs=3", "data.source=/etc"])
    assert bad.exit_code == 1
    assert "refused [policy-work]" in bad.output and "refused [policy-data]" in bad.output
    assert runner.invoke(command, ["node", "policy", "quickstart"]).exit_code == 0
