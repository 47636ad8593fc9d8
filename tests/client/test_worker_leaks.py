"""One process that serves several clients: the base is loaded once, nothing of one is left."""

import gc
from collections.abc import Sequence

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankfit.client import workspace as workspace_module
from rankfit.client.request_handler import perform
from rankfit.client.worker_protocol import Answer, Request
from rankfit.client.workspace import Workspace
from rankfit.tasks.base_model import load_base
from tests.client.workers import evaluate, settings, train


def figures(answer: Answer) -> dict[str, object]:
    arrays = {name: array.tobytes() for name, array in answer.arrays.items()}
    metrics = {name: value for name, value in answer.metrics.items() if name != "train-seconds"}
    return arrays | metrics


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def alive() -> list[object]:
    """Optimizers, adapters and parameters that are alive in this process."""
    gc.collect()
    kinds = torch.optim.Optimizer | LoraLayer | nn.Parameter
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


@pytest.fixture(autouse=True)
def known() -> list[object]:
    """What other tests of this process left: held, so that no id is given twice."""
    KNOWN[:] = alive()
    return KNOWN


KNOWN: list[object] = []


def leftovers(space: Workspace) -> list[object]:
    """Optimizers, adapters and foreign parameters that came since the test began."""
    own = {id(parameter) for parameter in space.base.parameters()}
    before = {id(thing) for thing in KNOWN}
    return [thing for thing in alive() if id(thing) not in own and id(thing) not in before]


def test_clients_in_one_process_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def counted(*arguments: object) -> object:
        loads.append(arguments)
        return load_base(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(workspace_module, "load_base", counted)
    config = settings()
    work: list[Request] = [
        train(8, 1, 0), train(3, 1, 1), evaluate(0), train(12, 2, 0), train(1, 2, 1), evaluate(1),
    ]  # fmt: skip
    alone = [figures(perform(Workspace(config, None), request)) for request in work]
    loads.clear()

    shared = Workspace(config, None)
    before = snapshot(shared.base)
    for turn in (work, list(reversed(work))):
        found = [figures(perform(shared, request)) for request in turn]
        assert found == (alone if turn is work else alone[::-1])
    assert len(loads) == 1

    after = snapshot(shared.base)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad or p.grad is not None for p in shared.base.parameters())
    assert not shared.base.training
    gc.collect()
    assert leftovers(shared) == []


def test_a_client_reads_its_own_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace(settings(), None)
    seen: set[int] = set()
    collate = type(space.task.train).collate

    def recorded(split: object, indices: Sequence[int]) -> dict[str, Tensor]:
        if split is space.task.train:
            seen.update(indices)
        return collate(split, indices)  # type: ignore[arg-type]

    monkeypatch.setattr(type(space.task.train), "collate", recorded)
    for partition in (0, 1):
        seen.clear()
        perform(space, train(2, 1, partition))
        assert seen == set(space.samples(partition, 2).tolist())
    assert not set(space.samples(0, 2).tolist()) & set(space.samples(1, 2).tolist())


def test_a_failed_training_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace(settings(), None)
    expected = figures(perform(space, train(4, 1, 1)))
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", _fails)
    with pytest.raises(RuntimeError, match="to order"):
        perform(space, train(8, 1, 0))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert leftovers(space) == []
    assert figures(perform(space, train(4, 1, 1))) == expected


def _fails(*_: object, **__: object) -> None:
    raise RuntimeError("to order")
