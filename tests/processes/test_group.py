"""One client in two processes: they train as one does, fail together and end together."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from rankfit.client import worker_proxy
from rankfit.client.accelerate_config import DataParallel
from rankfit.client.request_handler import perform
from rankfit.client.worker_protocol import Request
from rankfit.client.worker_registry import WorkerSpec
from rankfit.client.workspace import Workspace
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
from tests.processes.deployment import ROOT

pytestmark = pytest.mark.processes

#: The second client's last batch has one sample, for one process.
UNEVEN = ("train.batch-size=32", "train.epochs=2")


def of_two(device: Node, *overrides: str) -> WorkerSpec:
    return replace(device.spec(*overrides), group=DataParallel(2, cpu=True))


def members() -> list[psutil.Process]:
    """The worker and the other processes of its group."""
    worker = process_of(the_place())
    return [worker, *worker.children()]


def planned(request: Request, **changes: int) -> Request:
    asked = request.instruction
    assert asked is not None
    plan = {**asked.plan, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return replace(request, instruction=replace(asked, plan=plan))


def test_two_processes_train_what_one_does_fall_back_and_end_together(device: Node) -> None:
    spec = of_two(device, *UNEVEN)
    worker_proxy.prefetch(spec, Request("prefetch", partition=1, partitions=2))
    alone = Workspace(settings(*UNEVEN), None)
    assert len(alone.samples(1, 2)) % 32 == 1
    for number, rank in ((1, 4), (2, 8)):
        one = perform(alone, planned(train(rank, number, 1), micro_batch=32))
        two = worker_proxy.ask(spec, planned(train(rank, number, 1), micro_batch=16))
        assert one.arrays.keys() == two.arrays.keys()
        for name, array in one.arrays.items():
            np.testing.assert_allclose(two.arrays[name], array, rtol=2e-3, atol=2e-5, err_msg=name)
        assert two.metrics["train-loss"] == pytest.approx(one.metrics["train-loss"], rel=1e-4)
        assert two.metrics["steps"] == one.metrics["steps"]
        assert two.metrics["peak-memory-bytes"] < 0.8 * one.metrics["peak-memory-bytes"]
    tight = replace(
        planned(train(8, 2, 1), micro_batch=16), cap_bytes=int(two.metrics["peak-memory-bytes"]) - 1
    )
    smaller = worker_proxy.ask(spec, tight).metrics
    assert smaller["out-of-memory"] == 1 and smaller["micro-batch"] == 8
    assert smaller["steps"] == two.metrics["steps"]
    assert worker_proxy.ask(spec, evaluate()).metrics == perform(alone, evaluate()).metrics
    place, processes = the_place(), members()
    assert len(processes) == 2
    worker_proxy.finish(spec)
    wait_for(lambda: all(gone(each, place.folder) for each in processes), "all are gone", 60.0)


def test_a_process_that_dies_costs_one_update(device: Node) -> None:
    spec = of_two(device, "train.epochs=500")
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(worker_proxy.ask, spec, train())
        place = next_place()
        wait_for(lambda: log_text(place).count("base model") >= 2, "both have the base")
        worker, other = members()
        other.kill()
        with pytest.raises(worker_proxy.WorkerError, match="died during train"):
            lost.result(60)
    # The kernel closes a process's sockets, which the proxy sees, before it is gone.
    wait_for(lambda: not runs(worker), "the worker is gone", 60.0)
    short = of_two(device)
    assert worker_proxy.ask(replace(short, run_id=2), train()).metrics["steps"] > 0
    worker_proxy.finish(replace(short, run_id=2))


_MEETS = """
import sys, psutil, torch
from pathlib import Path
from rankfit.client.data_parallel import Group, OtherFailed
what = sys.argv[1]
group = Group.joined(Path(sys.argv[2]), cpu=True)
listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
assert all(ip in ("127.0.0.1", "::1") for ip in listening), listening
told = "nothing"
for attempt in range(2):
    try:
        with group.meeting():
            (total,) = group.agree(group.rank + 1)
            assert total == 3
            if group.rank == 1 and attempt == 0:
                raise torch.OutOfMemoryError("full") if what == "memory" else ValueError("bad row")
            parameter = torch.nn.Parameter(torch.ones(3))
            if group.rank == 0:
                parameter.grad = torch.full((3,), 2.0)
            group.agree()
            group.add_gradients([parameter])
            assert parameter.grad.tolist() == [2.0] * 3 and group.largest(group.rank) == 1
            group.part()
    except (torch.OutOfMemoryError, OtherFailed, ValueError) as error:
        told = type(error).__name__
print(told)
"""


@pytest.mark.parametrize(
    ("what", "told"),
    [("memory", ["OutOfMemoryError"] * 2), ("row", ["OtherFailed", "ValueError"])],
)
def test_what_fails_in_one_process_fails_in_all(what: str, told: list[str], tmp_path: Path) -> None:
    started = []
    for rank in range(2):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        own |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
        own |= {"GLOO_SOCKET_IFNAME": "lo"}
        environment = os.environ | {key: str(value) for key, value in own.items()}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", _MEETS, what, str(tmp_path / "store")],
                env=environment, cwd=Path(ROOT), stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        assert [process.communicate(timeout=300)[0].split()[-1] for process in started] == told
    finally:
        for process in started:
            process.kill()
            process.wait()
