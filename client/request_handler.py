"""Does what a client is asked, in this process: the one path of simulation and worker alike."""

import torch

from rankfit.adapters.adapter import Adapter
from rankfit.adapters.wire import decode, encode_update
from rankfit.client import trainer
from rankfit.client.worker_protocol import Answer, Request
from rankfit.client.workspace import Workspace
from rankfit.configs.protocol import Instruction, Metric
from rankfit.configs.settings import derive
from rankfit.estimator.plan import Plan


def perform(workspace: Workspace, request: Request) -> Answer:
    """Load, train or evaluate.

    Raises
    ------
    WrongBase
        If the server plans for another base model.
    NotAllowed
        If the node's policy does not allow it.
    torch.OutOfMemoryError
        If not even the smallest plan fits.
    """
    if request.kind == "prefetch":
        workspace.load()
        workspace.samples(request.partition, request.partitions)
        return Answer()
    if request.instruction is None:
        raise ValueError(f"a request of kind {request.kind!r} says nothing of what it is of")
    if request.kind == "train":
        with workspace.group.meeting():
            workspace.check_base(request.instruction.fingerprint)
            return _train(workspace, request, request.instruction)
    if request.kind == "evaluate":
        workspace.check_base(request.instruction.fingerprint)
        return _evaluate(workspace, request, request.instruction)
    raise ValueError(f"nothing is known of a request of kind {request.kind!r}")


def _train(workspace: Workspace, request: Request, asked: Instruction) -> Answer:
    samples = workspace.samples(request.partition, request.partitions)
    workspace.policy.check_samples(len(samples))
    job = trainer.Job(
        client=asked.client,
        round=asked.round,
        plan=Plan.from_dict(asked.plan),
        adapter=_adapter(request, asked),
        samples=samples,
        cap_bytes=request.cap_bytes,
        own_head=workspace.head_store(request.partition, asked.run),
        moments=workspace.moment_store(request.partition, asked.run),
    )
    trained = trainer.train(workspace, job)
    settings = workspace.settings
    rounding = torch.Generator().manual_seed(
        derive(settings.run.seed, "wire", job.round, job.client)
    )
    given = job.adapter.state_dict()
    arrays = encode_update(trained.state, given, settings.wire.dtype, rounding)
    return Answer(arrays, trained.metrics)


def _evaluate(workspace: Workspace, request: Request, asked: Instruction) -> Answer:
    samples = workspace.test_samples(request.partition, request.partitions)
    workspace.policy.check_samples(len(samples))
    store = workspace.head_store(request.partition, asked.run)
    head = store.load(asked.round + 1) if store else None
    adapter = _adapter(request, asked)
    metrics = trainer.evaluate(workspace, adapter, samples, head, asked.precision)
    return Answer(metrics={Metric.NUM_EXAMPLES: len(samples), **metrics})


def _adapter(request: Request, asked: Instruction) -> Adapter:
    return Adapter.from_state_dict(decode(request.arrays), asked.scale)
