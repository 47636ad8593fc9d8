"""Rounds with thousands of clients, through the real strategy and grid interface in one process.

``python benchmarks/fleet.py [--clients 100 1000 10000] [--rounds 2] [--preset quickstart]``

Every client has a device of its own memory and link, drawn from a wide distribution. Its update is
made up: what it was given, plus noise, at the ranks of its plan. All of them take part in every
round. Each fleet is measured in a process of its own: seconds of the server (the made-up clients'
own are left out) for asking and planning, configuring, folding, finishing and saving, and the peak
of resident memory.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, write_record  # noqa: E402
from rankfit.adapters.names import moves_with  # noqa: E402
from rankfit.adapters.wire import decode, encode_update  # noqa: E402
from rankfit.configs import protocol  # noqa: E402
from rankfit.configs.compose import compose  # noqa: E402
from rankfit.configs.settings import RunSettings  # noqa: E402
from rankfit.estimator.device_report import DeviceReport  # noqa: E402
from rankfit.server.in_process import InProcessGrid  # noqa: E402
from rankfit.server.loop import build  # noqa: E402
from rankfit.server.run_directory import Checkpoint  # noqa: E402
from rankfit.strategies import messages  # noqa: E402
from rankfit.strategies.fleet import exchange  # noqa: E402

RESULT = Path(__file__).parent / "results" / "fleet.json"
MIB = 1 << 20


class MadeUp(InProcessGrid):
    """Clients without data or model; ``seconds`` is what they themselves took."""

    def __init__(self, settings: RunSettings, clients: int) -> None:
        self.seconds = 0.0
        self._settings = settings
        super().__init__(self._answer, {}, [{"partition-id": i} for i in range(clients)])

    def _answer(self, message: Message, context: Context) -> Message:
        began = time.perf_counter()
        try:
            if message.metadata.message_type == protocol.QUERY:
                content = self._device(int(context.node_config["partition-id"]))
            else:
                content = self._update(message)
            return Message(content, reply_to=message)
        finally:
            self.seconds += time.perf_counter() - began

    def _device(self, index: int) -> RecordDict:
        draw = random.Random(index)
        memory = int(draw.lognormvariate(2.0, 0.5) * MIB)
        report = DeviceReport(
            client=f"partition-{index}",
            accelerator="cpu",
            name="made up",
            uuid="",
            compute_capability="",
            total_bytes=memory,
            free_bytes=memory,
            reserved_bytes=0,
            processes=-1,
            source="declared",
            upload_mbps=draw.lognormvariate(2.0, 1.0),
            download_mbps=draw.lognormvariate(3.0, 1.0),
        )
        return RecordDict({"device": ConfigRecord({**report.to_dict()})})

    def _update(self, message: Message) -> RecordDict:
        plan = message.content["plan"]
        arrays = {name: a.numpy() for name, a in message.content["adapter"].items()}
        given = decode(arrays)
        noise = torch.Generator().manual_seed(message.metadata.dst_node_id)
        trained = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise)
            for name, tensor in given.items()
            if moves_with(name, plan["trainable"])
        }
        if plan["remainder-rank"]:  # the directions behind the plan's are frozen
            ranks = dict(zip(plan["modules"], plan["ranks"], strict=True))
            trained = {name: _cut(name, tensor, ranks) for name, tensor in trained.items()}
        wire = encode_update(trained, given, self._settings.wire.dtype, noise)
        metrics = {"num-examples": 10 + message.metadata.dst_node_id % 90, "train-loss": 1.0}
        return RecordDict(
            {
                "adapter": ArrayRecord({name: Array(np.asarray(a)) for name, a in wire.items()}),
                "metrics": MetricRecord(metrics),
                protocol.ORIGIN: messages.origin(message),
            }
        )


def _cut(name: str, tensor: torch.Tensor, ranks: dict[str, int]) -> torch.Tensor:
    for module, rank in ranks.items():
        if f".{module}.lora_A" in name:
            return tensor[:rank]
        if f".{module}.lora_B" in name:
            return tensor[:, :rank]
    return tensor


def measure(clients: int, rounds: int, preset: str) -> dict[str, Any]:
    """One fleet, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = compose(
            [
                preset,
                f"run.directory={folder}",
                f"run.rounds={rounds}",
                "server.evaluate=none",
                f"simulation.clients={clients}",
                f"server.clients-per-round={clients}",
                "server.min-clients=1",
                "partition.kind=local",
                "fleet.memory-mib=",
                "fleet.upload-mbps=",
                "fleet.download-mbps=",
            ]  # fmt: skip
        )
        federation = build(settings)
        grid = MadeUp(settings, clients)
        strategy, adapter = federation.strategy, federation.start
        federation.directory.create()
        base = _resident()
        steps: list[dict[str, float]] = []
        for number in range(1, rounds + 1):
            watch = Watch(grid)
            strategy.prepare(grid, number)
            watch.lap("plan")
            outgoing = strategy.open_round(number, adapter, grid)
            watch.lap("configure")
            for position, reply in exchange(grid, outgoing, 3600.0):
                strategy.receive(position, reply)
            watch.lap("fold")
            adapter, outcomes = strategy.close_round()
            watch.lap("finish")
            federation.directory.append_round({"round": number})
            checkpoint = Checkpoint(number, adapter, strategy.state(), strategy.tensors())
            federation.directory.save(checkpoint, federation.heads)
            watch.lap("save")
            steps.append(watch.laps)
            assert all(outcome.merged for outcome in outcomes)
        return {
            "clients": clients,
            "planned": len(strategy.plans),
            "distinct-ranks": len({tuple(p.ranks.values()) for p in strategy.plans.values()}),
            "rounds": steps,
            "cpu-seconds": time.process_time(),
            "resident-mib": {"before": base, "peak": _resident()},
        }


class Watch:
    """Seconds of the server between laps."""

    def __init__(self, grid: MadeUp) -> None:
        self.laps: dict[str, float] = {}
        self._grid = grid
        self._last = (time.perf_counter(), grid.seconds)

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = (time.perf_counter(), self._grid.seconds)
        self.laps[name] = (now[0] - self._last[0]) - (now[1] - self._last[1])
        self._last = now


def _resident() -> float:
    """Peak of resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure each fleet in a process of its own, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.rounds, options.preset)))
        return
    results = []
    for clients in options.clients:
        command = [sys.executable, __file__, "--one", str(clients)]
        command += ["--rounds", str(options.rounds), "--preset", options.preset]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        record = {"benchmark": "fleet", "preset": options.preset}
        record |= machine("torch", "flwr") | {"results": results}
        write_record(options.output, record)
    names = ("plan", "configure", "fold", "finish", "save")
    table = Table("clients", *(f"{name} s" for name in names), "before MiB", "peak MiB")
    for result in results:
        last = result["rounds"][0]
        memory = result["resident-mib"]
        cells = [f"{last[name]:.2f}" for name in names]
        table.add_row(
            str(result["clients"]), *cells, f"{memory['before']:.0f}", f"{memory['peak']:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
