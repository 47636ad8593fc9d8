"""What cannot be estimated is a clear error that names the value and what to do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rankfit.configs.settings import ConfigError, Model, from_flat
from rankfit.estimator import recording
from rankfit.estimator.plan_search import Estimator
from rankfit.estimator.recording import TraceError, record
from rankfit.estimator.step_spec import InputSpec
from rankfit.estimator.tracer import trace
from rankfit.tasks.base_model import ModelError, load_config

from .small import device, images, step_spec, vit_config


@pytest.mark.parametrize("mib", [0, -5])
def test_memory_of_nothing_or_less(mib: int):
    with pytest.raises(ValueError, match="expected 0 <= free <= total and total above 0"):
        device(mib)


def test_free_memory_above_the_total():
    with pytest.raises(ValueError, match="free 2097152 of 1048576"):
        device(1, free_bytes=2 * 2**20)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"model.precision": "fp8"}, "model.precision.*'fp32', 'bf16' or 'fp16'.*'fp8'"),
        ({"model.attention": "paged"}, "model.attention.*'sdpa' or 'eager'"),
        ({"train.optimizer": "lion"}, "train.optimizer.*'adamw', .*'sgd' or 'adafactor'"),
        ({"plan.search": "micro-batch,precision"}, "plan.search: unknown step 'precision'"),
        ({"plan.precisions": "bf16,fp12"}, "plan.precisions: unknown precision 'fp12'"),
        ({"model.quantization": "int4"}, "model.quantization.*'int4'"),
        (
            {"model.precision": "fp16", "train.autocast": "bf16"},
            "train.autocast bf16 with a base in fp16 mixes two 16-bit types",
        ),
        ({"train.momentum": 1.5}, "train.momentum"),
        ({"plan.margin-mib": -1.0}, "plan.margin-mib"),
        ({"plan.read-memory": "never"}, "plan.read-memory"),
        ({"fleet.memory-mib": "4,0"}, "fleet.memory-mib: every figure must be above 0"),
    ],
)
def test_settings_that_are_not_known(flat: dict[str, str | float], message: str):
    with pytest.raises(ConfigError, match=message):
        from_flat(flat)


def test_a_number_type_that_is_not_known():
    with pytest.raises(ValueError, match="unknown number type 'float8'; expected one of float32"):
        InputSpec("pixel_values", (3, 16, 16), "float8")


def test_targets_that_match_nothing():
    settings = from_flat({"lora.targets": "q_porj"})
    with pytest.raises(ModelError, match="q_porj"):
        Estimator.for_run(settings, vit_config(), images(16))


def test_a_model_with_code_of_its_own_without_trust(tmp_path: Path):
    own = {"AutoConfig": "configuration_own.OwnConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    with pytest.raises(ModelError, match="model.source .*cannot be read: .*custom code"):
        load_config(Model(source=str(tmp_path)), labels=2)


def test_an_architecture_that_transformers_does_not_know():
    spec = step_spec("vit")
    changed = json.dumps({**json.loads(spec.config), "model_type": "own"})
    with pytest.raises(ModelError, match="without code of its own"):
        trace(replace(spec, config=changed))


class Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def model_of(forward: object) -> nn.Module:
    """A model whose forward pass is a function of its one weight."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, device="meta"))

        def forward(self, **inputs: torch.Tensor) -> Output:
            return Output(forward(self.weight))  # type: ignore[operator]

    return Small()


def test_a_kernel_without_a_meta_implementation(monkeypatch: pytest.MonkeyPatch):
    @torch.library.custom_op("rankfit_test::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    monkeypatch.setattr(
        recording, "build", lambda *_: model_of(lambda weight: (weight * opaque(weight)).sum())
    )
    with pytest.raises(TraceError, match="rankfit_test::opaque.*meta implementation"):
        record(step_spec("vit"), {})


def test_a_model_that_reads_a_number_to_decide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        recording, "build", lambda *_: model_of(lambda weight: weight.sum() * float(weight.max()))
    )
    with pytest.raises(TraceError, match="reads a torch.float32 value out of a tensor"):
        record(step_spec("vit"), {})
