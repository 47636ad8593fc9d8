"""Local training of language models, and the settings of the training step."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tiny_lm import save_model, save_tokenizer
from rankfit.adapters.adapter import Adapter, initial
from rankfit.adapters.names import Rates
from rankfit.client.trainer import Job, train
from rankfit.client.workspace import Workspace
from rankfit.configs.settings import from_flat
from rankfit.estimator.plan import Plan
from rankfit.estimator.plan_search import Estimator, inputs_of
from rankfit.tasks.base_model import target_modules
from rankfit.tasks.records import DataError
from rankfit.tasks.targets import target_shapes
from tests.estimator.small import device

RECORDS = [
    {
        "instruction": f"Say {'a much longer thing ' * (i % 4)}{i}.",
        "output": f"it is {i} " * (i + 1),
    }
    for i in range(8)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    save_model(folder, save_tokenizer(folder, [str(r) for r in RECORDS]), hidden=32)
    (folder / "train.json").write_text(json.dumps(RECORDS))
    (folder / "test.json").write_text(json.dumps(RECORDS))
    return folder


def workspace(root: Path, **changes: object) -> Workspace:
    flat = {
        "task.kind": "causal-lm",
        "model.source": str(root),
        "data.source": str(root),
        "data.max-length": 256,
        "train.batch-size": 8,
        "train.optimizer": "sgd",
        "train.learning-rate": 0.5,
        "lora.rank": 2,
    }
    return Workspace(from_flat(flat | changes), None)  # type: ignore[operator]


def start(space: Workspace) -> Adapter:
    targets = target_modules(space.base, "default")
    shapes = target_shapes(space.base, targets, 2)
    return initial(shapes, 2, 1.0, {}, seed=1)


def with_b(adapter: Adapter) -> Adapter:
    """The same with a B that is not zero, so that A has a gradient."""
    factors = {
        module: replace(own, b=torch.full_like(own.b, 0.1))
        for module, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def trained(space: Workspace, micro_batch: int, checkpointing: bool = False):
    adapter = start(space)
    plan = Plan(
        ranks=adapter.ranks,
        trainable="both",
        micro_batch=micro_batch,
        accumulation=-(-8 // micro_batch),
        checkpointing=checkpointing,
        peak_bytes=0,
        budget_bytes=0,
        binding="cap",
        remainder_rank=0,
    )
    job = Job("one", 1, plan, adapter, np.arange(8), None)
    return train(space, job)


def same(one, two, tolerance: float = 1e-6) -> None:
    assert one.state.keys() == two.state.keys()
    for name, tensor in one.state.items():
        assert torch.allclose(tensor, two.state[name], atol=tolerance), name
    assert one.metrics["train-loss"] == pytest.approx(two.metrics["train-loss"], abs=tolerance)


def test_accumulation_and_packing_leave_the_gradient_as_it_is(root: Path) -> None:
    """Answers of very different lengths: the loss is a mean over tokens, not over samples."""
    space = workspace(root)
    whole = trained(space, 8)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in whole.state.items() if "_B" in name)
    same(whole, trained(space, 3))
    same(whole, trained(space, 8, checkpointing=True))
    packed = workspace(root, **{"task.packing": True})
    same(whole, trained(packed, 8), 1e-5)


def test_bf16_autocast_stays_close_and_keeps_float32_factors(root: Path) -> None:
    plain = trained(workspace(root), 8)
    cast = trained(workspace(root, **{"train.autocast": "bf16"}), 8)
    assert all(tensor.dtype == torch.float32 for tensor in cast.state.values())
    assert cast.metrics["train-loss"] != plain.metrics["train-loss"]
    same(plain, cast, 0.05)


def test_a_compiled_step_is_the_same_step(root: Path) -> None:
    same(trained(workspace(root), 8), trained(workspace(root, **{"train.compile": "eager"}), 8))


def test_the_plan_says_how_fast_factors_learn_of_adam_alone(root: Path) -> None:
    """Hidden width 32: a step of Adam at one rate moves a row by √32 learning rates.

    A plan of rank 2 with both falls to 2/√2 learning rates.
    """
    for optimizer, slows in (("adamw", True), ("adafactor", False)):
        space = workspace(
            root,
            **{"train.optimizer": optimizer, "train.learning-rate": 1e-3, "train.steps": 1},
        )
        adapter = with_b(start(space))
        plan = Plan(adapter.ranks, "both", 8, 1, False, 0, 0, "cap")
        found = {}
        for step in (0.0, 2.0):
            own = replace(plan, rates=Rates(0.5, step) if step else Rates())
            job = Job("one", 1, own, adapter, np.arange(8), None)
            found[step] = Adapter.from_state_dict(train(space, job).state, adapter.scale)
        for module, given in adapter.factors.items():
            fast, slow = (found[step].factors[module] for step in (0.0, 2.0))
            turns = [(own.a - given.a).norm(dim=1).max() for own in (fast, slow)]
            if slows:
                assert turns[0] == pytest.approx(32**0.5 * 1e-3, rel=0.05)
                assert turns[1] == pytest.approx(2e-3 / 2**0.5, rel=0.05)
                moved = [(own.b - given.b).abs().max() for own in (fast, slow)]
                assert moved[1] == pytest.approx(float(moved[0]) / 2**0.5, rel=0.05)
            else:
                assert torch.equal(fast.a, slow.a) and torch.equal(fast.b, slow.b)


def test_rows_without_an_answer_in_them_are_refused(root: Path) -> None:
    """``data.max-length`` 1 leaves no token to learn: the row is named at once."""
    with pytest.raises(DataError, match="row 0 has no token to learn"):
        trained(workspace(root, **{"data.max-length": 1}), 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.optimizer": "adamw-fused", "train.learning-rate": 0.05},
        {"train.optimizer": "adafactor", "train.learning-rate": 0.05},
        {"train.momentum": 0.9, "train.learning-rate": 0.1},
        {"model.precision": "fp16"},
        {"train.autocast": "fp16"},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_every_way_to_train_learns_within_its_estimate(
    root: Path, changes: dict[str, object]
) -> None:
    space = workspace(root, **changes, **{"train.steps": 6})
    precision = space.settings.model.base_precision
    adapter = start(space)
    plan = Plan(adapter.ranks, "both", 8, 1, False, 0, 0, "cap", precision=precision)
    result = train(space, Job("one", 1, plan, adapter, np.arange(8), None))
    longer = train(
        workspace(root, **changes, **{"train.steps": 12}),
        Job("one", 1, plan, adapter, np.arange(8), None),
    )
    assert longer.metrics["train-loss"] < result.metrics["train-loss"]
    assert all(tensor.dtype == torch.float32 for tensor in result.state.values())
    estimator = Estimator.for_run(
        space.settings, space.base.config, inputs_of(space.task.example_batch(1))
    )
    footprint = estimator.footprint(device(1), estimator.steps[0])
    lengths = space.task.train.collate(list(range(8)))["input_ids"].shape[1]
    assert lengths < 256, "the estimate is of the longest text there can be"
    assert result.metrics["peak-memory-bytes"] < footprint.live(2)
