"""The Flower ClientApp: a thin layer between Flower and what trains.

Flower's deployment starts a process for every message, and importing torch would cost each of them
seconds: there, a worker does the work and this process imports no torch. A simulation's processes
live on, and do the work themselves. See docs/warm-client.md.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from rankfit.adapters.delta import Arrays, apply_delta
from rankfit.client.accelerate_config import DataParallel
from rankfit.client.device import OwnMemory, Placement, device_report, partition_of_node
from rankfit.client.policy import NotAllowed, Policy
from rankfit.client.worker_protocol import Answer, Kind, Request
from rankfit.configs import protocol
from rankfit.configs.faults import Fault, fault_of
from rankfit.configs.protocol import ClientState, Instruction, LinkProbe
from rankfit.configs.settings import NodeConfigError, RunSettings, from_flat
from rankfit.estimator.device_report import DeviceReport

if TYPE_CHECKING:
    from rankfit.client.worker_registry import WorkerSpec

log = logging.getLogger(__name__)

app = ClientApp()

#: The program that Flower's deployment starts for every message.
_PER_MESSAGE = "flwr-clientapp"
#: Record of the node's state: the adapter that it was sent last.
_RECEIVED = "received"
#: Record of the node's state: settings of this run that it said it does not use.
_NOT_USED_SAID = "not-used"
#: Flower's code for an error of the app.
_RAISED = 2

Handler = Callable[[Message, Context], Message]


def _coded(handler: Handler) -> Handler:
    """Answer with a fault where a handler raises.

    Flower would send an exception's text to the server, which may hold what the data holds. The
    text goes to this process's log, and out only where the node's policy says so.
    """

    @wraps(handler)
    def handled(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:  # noqa: BLE001 - whatever model, data and libraries can raise
            fault = fault_of(error)
            code, kind = fault.code, message.metadata.message_type
            if code.startswith(("policy-", "node-")):
                log.warning("%s refused [%s]: %s", kind, code, " ".join(fault.text.split()))
            else:
                log.error("%s failed [%s]", kind, code, exc_info=error)
        text = fault.text if _tells(context) else ""
        sent = Fault(fault.code, fault.row, fault.kind, " ".join(text.split()))
        return Message(Error(_RAISED, sent.written()), reply_to=message)

    return handled


def _tells(context: Context) -> bool:
    """Whether the owner of this node lets texts out."""
    try:
        return Policy.of_node(context.node_config).texts
    except Exception:  # noqa: BLE001 - what cannot be read allows nothing
        return False


@app.query(protocol.QUERY.removeprefix("query."))
@_coded
def capabilities(message: Message, context: Context) -> Message:
    """Answer with the device report; a worker may begin to load what training will need."""
    _allowed(context)
    _tell_ignored(context)
    spec = _worker_spec(context)
    partition, shared = _place(context)
    partitions = 0 if partition is None else shared
    if spec is None:
        report = _report(context, _own(), _placement())
    else:
        from rankfit.client import worker_proxy

        worker_proxy.make_room(spec)
        report = _report(context, worker_proxy.own_memory(spec))
        if spec.settings.client.prefetch:
            request = Request("prefetch", partition=partition, partitions=shared)
            worker_proxy.prefetch(spec, request, report.uuid)
    content = RecordDict(
        {
            protocol.DEVICE: ConfigRecord({**report.to_dict()}),
            protocol.CLIENT: ConfigRecord(ClientState(spec is not None, partitions).to_dict()),
        }
    )
    if protocol.LINK in message.content:  # the server times a payload
        probe = LinkProbe.from_dict(message.content.config_records[protocol.LINK])
        content[protocol.PAYLOAD] = _payload(probe)
    return Message(content, reply_to=message)


@app.query(protocol.FINISH.removeprefix("query."))
@_coded
def finish(message: Message, context: Context) -> Message:
    """The run is over for this client: its worker ends, if it has one."""
    spec = _worker_spec(context)
    if spec is not None:
        from rankfit.client import worker_proxy

        worker_proxy.finish(spec)
    return Message(RecordDict(), reply_to=message)


@app.train()
@_coded
def train(message: Message, context: Context) -> Message:
    """Train at the plan that came with the message, and return what moved."""
    answer = _perform("train", message, context)
    arrays = {name: Array(array) for name, array in answer.arrays.items()}
    content = RecordDict(
        {
            protocol.ADAPTER: ArrayRecord(arrays),
            protocol.METRICS: MetricRecord({**_policy(context).let_out(answer.metrics)}),
            protocol.ORIGIN: ConfigRecord(_instruction(message).origin),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
@_coded
def evaluate(message: Message, context: Context) -> Message:
    """Measure the global adapter on the client's own data."""
    answer = _perform("evaluate", message, context)
    metrics = MetricRecord({**_policy(context).let_out(answer.metrics)})
    content = RecordDict({protocol.METRICS: metrics})
    return Message(content, reply_to=message)


def _perform(kind: Kind, message: Message, context: Context) -> Answer:
    """Do what a message asks, if the node allows it: in the worker, or here."""
    _allowed(context)
    spec = _worker_spec(context)
    if spec is not None:
        from rankfit.client import worker_proxy

        report = _report(context, worker_proxy.own_memory(spec))
        return worker_proxy.ask(spec, _request(kind, message, context, report), report.uuid)
    report = _report(context, _own(), _placement())
    _see_only(report)
    from rankfit.client.request_handler import perform
    from rankfit.client.workspace import workspace

    space = workspace(_settings(context), _data_path(context), _policy(context))
    return perform(space, _request(kind, message, context, report))


def _request(kind: Kind, message: Message, context: Context, report: DeviceReport) -> Request:
    instruction = _instruction(message)
    _policy(context).check_plan(int(cast(int, instruction.plan.get("peak-bytes", 0))))
    arrays = _arrays(message, context)
    partition, partitions = _place(context)
    return Request(
        kind=kind,
        instruction=instruction,
        arrays=arrays,
        partition=partition,
        partitions=partitions,
        cap_bytes=report.budget_bytes if report.source == "declared" else None,
    )


def _instruction(message: Message) -> Instruction:
    return Instruction.from_dict(message.content.config_records[protocol.PLAN])


def _arrays(message: Message, context: Context) -> Arrays:
    """The adapter of a message, completed from what this node was sent before."""
    sent = _numpy(message.content.array_records[protocol.ADAPTER])
    places = message.content.config_records.get(protocol.DELTA)
    if places is None:
        return sent
    before = context.state.array_records.get(_RECEIVED)
    where = cast(Mapping[str, list[int]], places)
    arrays = apply_delta(sent, where, _numpy(before) if before is not None else {})
    context.state[_RECEIVED] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return arrays


def _numpy(record: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in record.items()}


def _warm(settings: RunSettings, context: Context) -> bool:
    """Whether a worker does the work."""
    # Process 1 of a container of its own has no parent, and a worker would end with it.
    if settings.client.warm == "off" or sys.platform == "win32" or os.getppid() == 0:
        return False
    if Path(os.environ.get("VIRTUAL_ENV", "")).name == str(context.run_id):
        log.warning("Flower installed the app's packages for this message alone: no worker")
        return False
    return settings.client.warm == "on" or _deployed()


def _deployed() -> bool:
    """Whether this process belongs to a SuperNode, not to a simulation."""
    return Path(sys.argv[0]).stem == _PER_MESSAGE


def _tell_ignored(context: Context) -> None:
    """Say once a run which of its settings a node of a deployment does not use."""
    ignored = from_flat(context.run_config).simulated_keys() if _deployed() else []
    if ignored and _NOT_USED_SAID not in context.state.config_records:
        log.warning("not used, they count in a simulation alone: %s", ", ".join(ignored))
        context.state[_NOT_USED_SAID] = ConfigRecord({"settings": ignored})


def _worker_spec(context: Context) -> "WorkerSpec | None":
    """What this device's worker in this run is for; None where there is to be none."""
    settings = _settings(context)
    if not _warm(settings, context):
        return None
    from rankfit.client.worker_registry import ProcessHandle, WorkerSpec

    return WorkerSpec(
        run_id=context.run_id,
        node_id=context.node_id,
        supernode=ProcessHandle.of(os.getppid()),
        settings=settings,
        data_path=_data_path(context),
        group=_group(context),
        policy=_policy(context),
    )


def _policy(context: Context) -> Policy:
    return Policy.of_node(context.node_config)


def _allowed(context: Context) -> None:
    """Refuse a run that asks for what this node does not allow."""
    _policy(context).check(_settings(context), _data_path(context))


def _group(context: Context) -> DataParallel:
    """What the node's ``accelerate-config`` asks for."""
    path = context.node_config.get("accelerate-config")
    if path is None:
        return DataParallel()
    settings = _settings(context)
    group = DataParallel.of_file(Path(str(path)).expanduser(), settings.train.autocast)
    if group.size > 1 and not _warm(settings, context):
        raise NodeConfigError(
            f"accelerate-config {path} asks for {group.size} processes, which only a worker starts "
            "(docs/warm-client.md); client.warm is 'off', or Flower keeps one from running here"
        )
    return group


def _settings(context: Context) -> RunSettings:
    settings = from_flat(context.run_config)
    return settings.deployed() if _deployed() else settings


def _report(
    context: Context, worker: OwnMemory | None = None, placement: Placement | None = None
) -> DeviceReport:
    return device_report(
        context.node_config,
        _settings(context),
        node_id=context.node_id,
        worker=worker,
        group=_group(context),
        placement=placement,
        most_bytes=_policy(context).memory_bytes,
    )


def _placement() -> Placement | None:
    """What Ray gave this process of the simulation's GPUs; None elsewhere, and without GPUs."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    share = float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
    if not share:
        return None
    import psutil

    visible = None
    with suppress(psutil.Error):  # Ray's own process was started with all GPUs of the simulation
        visible = psutil.Process(os.getppid()).environ().get("CUDA_VISIBLE_DEVICES")
    return Placement(share, visible)


def _payload(probe: LinkProbe) -> ArrayRecord:
    """Random bytes, as many as the server asks for; nothing on the way can shrink them."""
    import numpy as np

    payload = np.frombuffer(os.urandom(probe.reply_bytes), dtype=np.uint8)
    return ArrayRecord({protocol.PAYLOAD: Array(payload)})


def _own() -> OwnMemory | None:
    """What this very process holds of its GPU, where it has trained before: free for it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    from rankfit.client.memory_meter import own_memory
    from rankfit.tasks.lora import training_device

    return own_memory(training_device())


def _see_only(report: DeviceReport) -> None:
    """Let CUDA see just the GPU that was measured, while it has not looked yet."""
    if report.uuid and "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = report.uuid


def _data_path(context: Context) -> str | None:
    path = context.node_config.get("data-path")
    return None if path is None else str(path)


def _place(context: Context) -> tuple[int | None, int]:
    """Position of this node among those that share a data set, and their number.

    Raises
    ------
    NotAllowed
        If the run deals one data set to several clients and nothing says which part is this
        node's: it would train on everybody's.
    """
    config, settings = context.node_config, _settings(context)
    dealt = settings.partition.kind != "local"
    place = partition_of_node(config)
    if place is None:
        if dealt and _data_path(context) is None:
            raise NotAllowed(
                f"partition.kind is {settings.partition.kind!r}, and this node has no partition-id",
                fault="node-partition",
            )
        return None, 1
    if not dealt:
        return place, int(config.get("num-partitions", 1))
    if "num-partitions" not in config:
        raise NotAllowed(
            f"node config has partition-id={place} and no num-partitions; say how many nodes share "
            "the data set: --node-config 'partition-id=0 num-partitions=2'",
            fault="node-partitions",
        )
    count = int(config["num-partitions"])
    if not place < count:
        raise NotAllowed(
            f"node config partition-id={place} num-partitions={count}: parts count from 0",
            fault="node-partitions",
        )
    return place, count
