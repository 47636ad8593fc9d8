"""Nothing that the data holds leaves a client: not in errors, not in the names of figures."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from PIL import Image

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.client.app import app as client_app
from rankfit.configs.compose import compose
from rankfit.configs.faults import SENTENCES, Fault, Faulty, fault_of
from rankfit.configs.settings import RunSettings, to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import federate
from rankfit.strategies import replies

#: In texts, labels, columns and the names of files and folders of every client.
MARK = "zebra-1987-05-03"


def picture(file: Path, grey: int = 100) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), grey, np.uint8)).save(file)


def good(folder: Path) -> None:
    for label in "ab":
        for number in range(6):
            picture(folder / "train" / label / f"{number}-{MARK}.png", 20 * number)
            picture(folder / "test" / label / f"{number}-{MARK}.png", 20 * number)


def foreign_class(folder: Path) -> None:
    good(folder)
    picture(folder / "train" / MARK / "0.png")


def broken_picture(folder: Path) -> None:
    good(folder)
    (folder / "train" / "a" / f"{MARK}.png").write_text(MARK)


def no_file(folder: Path) -> None:
    (folder / f"{MARK}.txt").write_text(MARK)


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def foreign_label(folder: Path) -> None:
    picture(folder / "x.png")
    (folder / "train.csv").write_text(f"image,label\nx.png,{MARK}\n")


def link_out(folder: Path) -> None:
    secret = folder.parent / f"secret-{MARK}"
    good(secret)
    (folder / "train").symlink_to(secret / "train")


def path_out(folder: Path) -> None:
    picture(folder.parent / f"{MARK}.png")
    (folder / "train.csv").write_text(f"image,label\n../{MARK}.png,a\n")


#: What is wrong with a client's data, and the code that the server is told.
DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "good": (good, ""),
    "class": (foreign_class, "data-label"),
    "picture": (broken_picture, "data-record"),
    "nothing": (no_file, "data-missing"),
    "columns": (write("train.csv", f"{MARK},other\n1,2\n"), "data-column"),
    "format": (write("train.jsonl", f'{{"{MARK}": [1, '), "data-format"),
    "label": (foreign_label, "data-label"),
    "empty": (write("train.csv", f"image,label,{MARK}\n"), "data-empty"),
    "no-picture": (
        write("train.csv", "image,label\n" + f"{MARK}.png,a\nb.png,b\n" * 12),
        "data-record",
    ),
    "kinds": (write("train.jsonl", f'{{"image":"{MARK}","label":["{MARK}"]}}'), "data-label"),
    "link": (link_out, "policy-data"),
    "path": (path_out, "policy-data"),
}
#: Node configs that cannot be used, by code.
CONFIGS = {
    "node-config": {"memory-mib": MARK},
    "node-policy": {"policy": f"/{MARK}.toml"},
    "policy-samples": {"policy": "samples"},
    "policy-columns": {"policy": "columns"},
    "policy-model": {"policy": "model"},
}
POLICIES = {
    "samples": "[data]\nminimum-samples = 1000\n",
    "columns": '[data]\ncolumns = ["image"]\n',
    "model": '[model]\nfingerprints = ["0000"]\n',
}


class ProcessHandle(InProcessGrid):
    """Keeps all that leaves a client, and tells when one is at work."""

    replies: list[tuple[str, str, Message]]
    at_work = False

    def _handle(self, message: Message) -> Message:
        self.at_work = True
        try:
            reply = super()._handle(message)
        finally:
            self.at_work = False
        name = str(self._contexts[message.metadata.dst_node_id].node_config["client-name"])
        self.replies.append((name, message.metadata.message_type, reply))
        return reply


@contextmanager
def server_lines(grid: ProcessHandle) -> Iterator[list[str]]:
    """Lines that are logged while no client is at work: the server's."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not grid.at_work:
                lines.append(self.format(record))

    keep, root = Keep(), logging.getLogger()
    before, package = root.level, logging.getLogger("rankfit")
    propagate, package.propagate = package.propagate, True
    root.addHandler(keep)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(keep)
        root.setLevel(before)
        package.propagate = propagate


def everything_in(reply: Message) -> str:
    if reply.has_error():
        return f"{reply.error.code} {reply.error.reason}"
    content: RecordDict = reply.content
    records = [*content.metric_records.items(), *content.config_records.items()]
    names = [name for record in content.array_records.values() for name in record]
    return repr([(name, dict(record)) for name, record in records]) + repr(names)


def settings_for(folder: Path, *overrides: str) -> RunSettings:
    return compose(
        [
            "quickstart", f"run.directory={folder / 'runs'}", "run.name=marks", "run.rounds=1",
            "data.source=nowhere", "partition.kind=local", 'data.class-names="a,b"',
            "server.evaluate=clients", "server.min-clients=1", "server.clients-per-round=50",
            "fleet.memory-mib=", "fleet.upload-mbps=", "fleet.download-mbps=", *overrides,
        ]
    )  # fmt: skip


def nodes_for(tmp_path: Path) -> dict[str, dict[str, str | int | float | bool]]:
    nodes = {}
    for name, (prepare, _) in DATA.items():
        folder = tmp_path / f"{name}-{MARK}"
        folder.mkdir()
        prepare(folder)
        nodes[name] = {"policy": "", "client-name": name, "data-path": str(folder)}
    for name, config in CONFIGS.items():
        config = dict(config)
        if config.get("policy") in POLICIES:
            file = tmp_path / f"{name}-{MARK}.toml"
            file.write_text(POLICIES[config["policy"]])
            config["policy"] = str(file)
        data = str(tmp_path / f"good-{MARK}")
        nodes[name] = {"policy": "", "client-name": name, "data-path": data, **config}
    data = f"/nowhere/{MARK}"
    nodes["absent"] = {"policy": "", "client-name": "absent", "data-path": data}
    nodes["nul"] = {"policy": "", "client-name": "nul", "data-path": f"{MARK}\0"}
    nodes["whose"] = {"policy": "", "client-name": "whose"}
    return nodes


def test_no_text_of_a_client_is_written_or_shown_by_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, nodes = settings_for(tmp_path), nodes_for(tmp_path)
    grid = ProcessHandle(client_app, to_flat(settings), list(nodes.values()))
    grid.replies = []
    with server_lines(grid) as lines:
        federate(grid, settings)
    told = {
        name: fault.code
        for name, _, reply in grid.replies
        if reply.has_error() and (fault := replies.fault(reply)) is not None
    }
    expected = {name: code for name, (_, code) in DATA.items() if code}
    expected |= {name: name for name in CONFIGS}
    expected |= {"absent": "data-missing", "nul": "unexpected", "whose": "data-missing"}
    assert told == expected
    for name, kind, reply in grid.replies:
        assert MARK not in everything_in(reply), (name, kind)
        assert not reply.has_error() or replies.fault(reply) is not None
    shown = "\n".join([*lines, *capsys.readouterr()])
    assert MARK not in shown
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert len(files) > 6
    for file in files:
        assert MARK.encode() not in file.read_bytes(), file
    # What to do is said all the same.
    rounds = (tmp_path / "runs" / "marks" / "rounds.jsonl").read_text()
    last = json.loads(rounds.splitlines()[-1])["clients"]
    assert last["good"]["merged"] and not last["label"]["merged"]
    assert "row 0" in last["label"]["reason"] and "data.class-names" in last["label"]["reason"]
    assert "policy file cannot be read" in shown


def test_a_node_can_let_its_texts_out(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("texts = true\n")
    folder = tmp_path / f"{MARK}-data"
    folder.mkdir()
    foreign_class(folder)
    settings = settings_for(tmp_path)
    node = {"client-name": "n", "policy": str(tmp_path / "policy.toml"), "data-path": str(folder)}
    context = Context(1, 2, node, RecordDict(), to_flat(settings))
    InProcessGrid(client_app, {}, [])  # messages are made within a run
    message = Message(RecordDict(), 2, "evaluate")
    reply = client_app(message, context)
    assert replies.fault(reply) == Fault("unexpected", kind="KeyError", text="'plan'")


def test_the_names_of_figures_hold_no_labels_of_a_node_but_those_of_the_run(
    tmp_path: Path,
) -> None:
    records = [
        {"instruction": f"Say {n}.", "output": f"it is {n}", "label": f"{MARK}-{n % 2}"}
        for n in range(8)
    ]
    save_model(tmp_path, save_tokenizer(tmp_path, [str(r) for r in records]), hidden=32)
    for part in ("train", "test"):
        (tmp_path / f"{part}.json").write_text(json.dumps(records))
    (tmp_path / "policy.toml").write_text(f'[model]\nsources = ["{tmp_path}"]\n')
    settings = settings_for(
        tmp_path, "task.kind=causal-lm", f"model.source={tmp_path}", "data.class-names=",
        "data.max-length=64", "task.max-new-tokens=4",
    )  # fmt: skip
    node = {
        "client-name": "n", "data-path": str(tmp_path), "policy": str(tmp_path / "policy.toml"),
    }  # fmt: skip
    grid = ProcessHandle(client_app, to_flat(settings), [node])
    grid.replies = []
    federate(grid, settings)
    (evaluation,) = [reply for _, kind, reply in grid.replies if kind == "evaluate"]
    assert not evaluation.has_error()
    figures = dict(evaluation.content.metric_records["metrics"])
    assert {"accuracy", "loss", "num-examples"} <= figures.keys()
    assert not any("." in name for name in figures)
    for file in (tmp_path / "runs").rglob("*"):
        assert not file.is_file() or MARK.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    "error",
    [ValueError(MARK), type(MARK, (Exception,), {})(MARK), ImportError(MARK), OSError(2, MARK)],
)
def test_an_error_without_a_code_leaves_without_its_text(error: Exception) -> None:
    fault = fault_of(error)
    assert fault.text and MARK in fault.text
    bare = Fault(fault.code, fault.row, fault.kind)
    assert MARK not in bare.written() and MARK not in bare.sentence()
    assert Fault.read(bare.written()) == bare


def test_only_faults_of_the_list_are_read() -> None:
    for text in ("", "rankfit", "rankfit zebra", "rankfit data-label row=x", f"<'{MARK}'>", "\0"):
        assert Fault.read(text) is None
    for code in SENTENCES:
        assert Fault.read(Fault(code, 3).written()) == Fault(code, 3)
        assert Fault.read(Fault(code).written()) == Fault(code)
        assert "\x1b" not in Fault(code, text="\x1b[31m").sentence()
    assert fault_of(Faulty("x", fault="data-label", row=7)).written().endswith("text=x")
    reply = Message(Error(2, f"<class 'ValueError'>:<'{MARK}'>"), reply_to=_sent())
    assert replies.failure(reply) == "it raised an error"


def _sent() -> Message:
    InProcessGrid(client_app, {}, [])
    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    return message
