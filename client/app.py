"""The Flower ClientApp: a thin messenger between Flower and the trainer.

The query is answered without torch: Flower starts a process for every message, and importing torch
would cost each of them seconds.
"""

import os
import sys
from typing import TYPE_CHECKING, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from rankfit.client.device import device_report
from rankfit.configs.settings import RunSettings, from_flat
from rankfit.estimator.plan import Plan
from rankfit.estimator.report import DeviceReport

if TYPE_CHECKING:
    from rankfit.adapters.state import Adapter
    from rankfit.client.workspace import Workspace

app = ClientApp()


@app.query("capabilities")
def capabilities(message: Message, context: Context) -> Message:
    """Answer with the device report."""
    report = _report(context)
    return Message(RecordDict({"device": ConfigRecord(report.to_dict())}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train at the plan that came with the message, and return what moved."""
    from rankfit.adapters.wire import encode
    from rankfit.client.trainer import Job
    from rankfit.client.trainer import train as train_job

    report = _report(context)
    _see_only(report)
    workspace = _workspace(context)
    config = cast(ConfigRecord, message.content["plan"])
    workspace.check_base(str(config["fingerprint"]))
    job = Job(
        client=str(config["client"]),
        round=cast(int, config["round"]),
        plan=Plan.from_dict(config),
        adapter=_adapter(message),
        samples=workspace.samples(*_place(context)),
        cap_bytes=report.budget_bytes if report.source == "declared" else None,
    )
    trained = train_job(workspace, job)
    arrays = encode(trained.state, workspace.settings.wire.dtype)
    content = RecordDict(
        {
            "adapter": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "metrics": MetricRecord(dict(trained.metrics)),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the global adapter on the client's own data."""
    from rankfit.client.trainer import evaluate as evaluate_adapter

    workspace = _workspace(context)
    config = cast(ConfigRecord, message.content["plan"])
    workspace.check_base(str(config["fingerprint"]))
    samples = workspace.test_samples(*_place(context))
    metrics = evaluate_adapter(workspace, _adapter(message), samples)
    record = MetricRecord({"num-examples": len(samples), **metrics})
    return Message(RecordDict({"metrics": record}), reply_to=message)


def _settings(context: Context) -> RunSettings:
    return from_flat(context.run_config)


def _report(context: Context) -> DeviceReport:
    return device_report(context.node_config, _settings(context), node_id=context.node_id)


def _see_only(report: DeviceReport) -> None:
    """Let CUDA see just the GPU that was measured, while it has not looked yet."""
    if report.uuid and "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = report.uuid


def _workspace(context: Context) -> "Workspace":
    from rankfit.client.workspace import workspace

    path = context.node_config.get("data-path")
    return workspace(_settings(context), None if path is None else str(path))


def _place(context: Context) -> tuple[int | None, int]:
    """Position of this node among those that share a data set, and their number."""
    config = context.node_config
    if "partition-id" not in config:
        return None, 1
    settings = _settings(context)
    partitions = config.get("num-partitions", settings.simulation.clients)
    return int(config["partition-id"]), int(partitions)


def _adapter(message: Message) -> "Adapter":
    from rankfit.adapters.state import Adapter
    from rankfit.adapters.wire import decode

    record = cast(ArrayRecord, message.content["adapter"])
    arrays = {name: array.numpy() for name, array in record.items()}
    scale = cast(ConfigRecord, message.content["plan"])["scale"]
    return Adapter.from_state_dict(decode(arrays), cast(float, scale))
