"""The worker by itself: what it answers, what it refuses, and that nothing is left of it."""

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rankfit.client import worker_proxy
from rankfit.client.request_handler import perform
from rankfit.client.worker_protocol import Answer, FrameError, Request, receive_frame, send_frame
from rankfit.client.worker_registry import (
    WorkerDir,
    WorkerDirError,
    WorkerStart,
    base_folder,
    stop,
    worker_dirs,
)
from rankfit.client.workspace import Workspace
from tests.client.nvml_stub.driver import MIB, build, gpu
from tests.client.workers import (
    Node,
    evaluate,
    gone,
    log_text,
    next_place,
    process_of,
    runs,
    settings,
    the_place,
    train,
    wait_for,
)

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("own_folders")]

LONG = "train.epochs=500"


def listening(device: Node, *overrides: str) -> Path:
    """Start a worker that has loaded nothing yet; return its folder."""
    worker_proxy.start(device.spec(*overrides))
    place = the_place()
    wait_for(place.socket.exists, "the worker listens")
    wait_for(lambda: "listens" in log_text(place), "the worker says so")
    return place.folder


def same(one: Answer, other: Answer) -> None:
    times = ("train-seconds",)
    assert {k: v for k, v in one.metrics.items() if k not in times} == {
        k: v for k, v in other.metrics.items() if k not in times
    }
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)


def test_ten_rounds_of_changing_ranks_load_the_base_once_and_figures_are_the_same(
    device: Node,
) -> None:
    spec = device.spec()
    worker_proxy.prefetch(spec, Request("prefetch", partition=0, partitions=2))
    place = the_place()
    for number in range(1, 11):
        rank = 1 + number * 5 % 12
        warm = worker_proxy.ask(spec, train(rank, number))
        cold = perform(Workspace(settings(), None), train(rank, number))
        same(warm, cold)
    same(worker_proxy.ask(spec, evaluate()), perform(Workspace(settings(), None), evaluate()))
    text = log_text(place)
    assert text.count("base model builtin:font-vit loaded") == 1, text
    assert text.count("train of round") == 20, text
    assert "prefetched" in text
    process = process_of(place)
    worker_proxy.finish(spec)
    wait_for(lambda: gone(process, place.folder), "the worker is gone", 60.0)


def test_killed_while_it_trains_and_between_rounds(device: Node) -> None:
    spec = device.spec(LONG)
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(worker_proxy.ask, spec, train(number=3))
        place = next_place()
        wait_for(lambda: "train of round 3: begins" in log_text(place), "it trains")
        wait_for(lambda: "loaded" in log_text(place), "it has the base")
        log_file = place.read().log
        process_of(place).kill()
        with pytest.raises(
            worker_proxy.WorkerError, match="died during train of round 3"
        ) as caught:
            lost.result(60)
    assert str(log_file) in str(caught.value) and "update is lost" in str(caught.value)
    assert worker_dirs() == []

    first = worker_proxy.ask(spec, evaluate())  # a new worker
    second = the_place()
    killed = process_of(second)
    killed.kill()
    wait_for(lambda: not second.alive(), "it is dead")
    same(worker_proxy.ask(spec, evaluate()), first)
    assert the_place().folder != second.folder and gone(killed, second.folder)


def test_two_messages_at_once_are_served_in_order(device: Node) -> None:
    spec = device.spec("train.epochs=3")
    alone = worker_proxy.ask(spec, train(2, 1))
    place = the_place()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(worker_proxy.ask, spec, train(8, 2, 0))
        wait_for(lambda: "train of round 2: begins" in log_text(place), "the first is begun")
        second = pool.submit(worker_proxy.ask, spec, train(2, 1, 0))
        first.result(60)
        same(second.result(60), alone)
    events = [line.split(": ", 1)[1] for line in log_text(place).splitlines() if "of round" in line]
    assert [event.split(",")[0].split(" in ")[0] for event in events] == [
        f"train of round {number}: {what}" for number in (1, 2, 1) for what in ("begins", "done")
    ]


def test_a_failed_message_costs_itself_and_names_the_log(device: Node) -> None:
    spec = device.spec()
    wrong = train()
    assert wrong.instruction is not None
    other = replace(wrong.instruction, fingerprint="0" * 64)
    wrong = Request("train", other, wrong.arrays, 0, 2)
    with pytest.raises(worker_proxy.WorkerError, match="WrongBase: .*worker's log: ") as caught:
        worker_proxy.ask(spec, wrong)
    process = process_of(the_place())
    assert str(the_place().read().log) in str(caught.value)
    assert caught.value.coded.code == "model-differs"
    assert worker_proxy.ask(spec, evaluate()).metrics["num-examples"] > 0
    assert process_of(the_place()) == process


def test_ends_with_its_supernode(device: Node) -> None:
    folder = listening(device)
    process = process_of(the_place())
    device.process.kill()
    device.process.wait()
    wait_for(lambda: gone(process, folder), "the worker is gone", 60.0)


def test_ends_when_idle(device: Node) -> None:
    place = worker_proxy.start(device.spec("client.idle-seconds=3"))
    process, log_file = process_of(place), place.read().log
    wait_for(lambda: gone(process, place.folder), "the worker is gone")
    assert "no message for 3 s" in log_file.read_text()


def test_ends_when_nobody_waits_for_its_answer(device: Node) -> None:
    place = WorkerDir(listening(device, LONG))
    process, token = process_of(place), place.read().token
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(place.socket))
        header = {**train().header(), "token": token}
        send_frame(connection, header, train().arrays, limit=2**20)
        assert receive_frame(connection, 0)[0] == {"accepted": True}
    wait_for(lambda: gone(process, place.folder), "the worker is gone", 60.0)


def test_ends_when_asked_busy_or_not(device: Node) -> None:
    folder = listening(device)
    process = process_of(the_place())
    stop(the_place())
    assert gone(process, folder)
    spec = device.spec(LONG)
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(worker_proxy.ask, spec, train())
        place = next_place()
        wait_for(lambda: "loaded" in log_text(place), "it trains")
        process = process_of(place)
        stop(place)
        assert gone(process, place.folder)
        with pytest.raises(worker_proxy.WorkerError, match="died"):
            lost.result(60)


@pytest.mark.parametrize(("policy", "left"), [("own", 2), ("wait", 1)])
def test_a_second_run_on_a_device(device: Node, policy: str, left: int) -> None:
    listening(device)
    first = process_of(the_place())
    worker_proxy.start(device.spec(f"client.second-run={policy}", run_id=2))
    assert len(worker_dirs()) == left
    assert runs(first) == (policy == "own")


def raw(place_socket: Path, data: bytes) -> dict[str, object]:
    """Send bytes and return the header of the answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(place_socket))
        connection.sendall(data)
        return receive_frame(connection, 0)[0]


def test_refuses_a_wrong_token_and_what_is_too_large(device: Node) -> None:
    folder = listening(device, "client.message-mib=1")
    path = folder / "socket"

    def frame(header: dict[str, object], length: int = 0) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack(">8sIQ", b"RankFit1", len(text), length) + text

    for token in ("0" * 64, "", None, "ü"):
        answer = raw(path, frame({**Request("finish").header(), "token": token}))
        assert answer["error"] == "Refused" and answer["text"] == "the token is not this worker's"
    token = the_place().read().token
    too_long = raw(path, frame({"token": token}, 2**21))
    assert "above the limit of 1048576" in str(too_long["text"])
    assert "above the limit" in str(raw(path, struct.pack(">8sIQ", b"RankFit1", 2**31, 0))["text"])
    assert "protocol" in str(raw(path, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")["text"])
    pickled = b"\x80\x04cos\nsystem\n(S'true'\ntR."
    body = frame({**Request("finish").header(), "token": token}, len(pickled)) + pickled
    assert "safetensors" in str(raw(path, body)["text"])
    assert "kind is 'eval'" in str(raw(path, frame({"token": token, "kind": "eval"}))["text"])
    assert runs(process_of(the_place()))
    with pytest.raises(FrameError, match=r"above the limit of 1048576; raise client.message-mib"):
        big = Request("train", arrays={"x": np.zeros(2**20, np.float32)})
        worker_proxy.ask(device.spec("client.message-mib=1"), big)
    worker_proxy.finish(device.spec())
    wait_for(lambda: not folder.exists(), "the worker is gone", 60.0)


def test_only_the_user_can_reach_it(device: Node) -> None:
    folder = listening(device)
    assert stat.S_IMODE(base_folder().stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("socket", "start.json", "process.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(the_place().read().log.stat().st_mode) == 0o600
    base_folder().chmod(0o755)
    try:
        with pytest.raises(WorkerDirError, match="nobody else can enter"):
            base_folder()
    finally:
        Path(os.environ["XDG_RUNTIME_DIR"], "rankfit").chmod(0o700)


def test_a_path_too_long_for_a_socket_is_refused(
    device: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(long))
        with pytest.raises(WorkerDirError, match="longer than 103 bytes"):
            worker_proxy.start(device.spec())
        assert worker_dirs() == []


def test_folders_of_workers_that_were_killed_are_swept(device: Node) -> None:
    folder = listening(device)
    process = process_of(the_place())
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: not the_place().alive(), "it is dead")
    worker_proxy.start(device.spec(run_id=2))
    assert not folder.exists() and len(worker_dirs()) == 1


def test_a_worker_that_is_found_can_be_read(device: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks holds no lock: half a folder is not to be seen, and one left behind goes."""
    write = WorkerDir.write

    def looked_at(place: WorkerDir, start: WorkerStart) -> None:
        assert worker_dirs() == [], "before"
        write(place, start)
        assert worker_dirs() == [], "before it is in its place"

    monkeypatch.setattr(WorkerDir, "write", looked_at)
    (base_folder() / ".killed-while-it-was-made").mkdir(mode=0o700)
    place = worker_proxy.start(device.spec())
    assert worker_dirs() == [place] and place.read().spec.run_id == 1
    assert [path.name for path in base_folder().iterdir()] == [place.folder.name]


def test_the_messenger_imports_no_torch() -> None:
    code = (
        "import sys, rankfit.client.app, rankfit.client.worker_proxy; "
        "print({'torch', 'transformers', 'peft', 'ray', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_what_the_worker_holds_of_the_gpu_counts_as_free(tmp_path: Path) -> None:
    library = build(tmp_path / "driver")
    code = (
        "from rankfit.client.device import OwnMemory, device_report; "
        "from rankfit.configs.settings import RunSettings; "
        "found = device_report({}, RunSettings(), node_id=1, "
        f"worker=OwnMemory(100, {500 * MIB})); "
        "print(found.free_bytes, found.processes)"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    environment |= gpu(free_mib=3000, PIDS="100,101")
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [str(3500 * MIB), "1"], done.stdout + done.stderr


def test_two_starts_at_once_make_one_worker(device: Node) -> None:
    spec = device.spec()
    barrier = threading.Barrier(4)

    def start_together() -> None:
        barrier.wait()
        worker_proxy.start(spec)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(start_together) for _ in range(4)]:
            future.result()
    assert len(worker_dirs()) == 1
