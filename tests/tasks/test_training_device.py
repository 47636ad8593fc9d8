"""The training device has an index: where torch caps its memory, it refuses a GPU without one."""

import re
from pathlib import Path

import pytest
import torch
from torch.cuda._utils import _get_device_index

import rankfit.tasks.lora
from rankfit.client.data_parallel import Group
from rankfit.configs.settings import RunSettings
from rankfit.server.evaluation import Evaluator

ROOT = Path(rankfit.tasks.lora.__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_a_client_and_the_evaluation_take_a_gpu_that_torch_can_cap(gpu):
    evaluator = Evaluator(RunSettings(), None, None, [])
    for device in (Group.alone().device, evaluator.device):
        assert device == torch.device("cuda", 0)
        assert _get_device_index(device) == 0  # as set_per_process_memory_fraction reads it
    with pytest.raises(ValueError, match="index"):
        _get_device_index(torch.device("cuda"))


def test_without_a_gpu_it_is_the_cpu():
    if not torch.cuda.is_available():
        assert Group.alone().device == torch.device("cpu")


def test_no_other_module_makes_a_gpu_device_of_its_own():
    made = {
        str(path.relative_to(ROOT))
        for folder in ("adapters", "cli", "client", "estimator", "server", "strategies", "tasks")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"""device\(\s*f?["']cuda""", path.read_text(encoding="utf-8"))
    }
    assert made == {"tasks/lora.py"}
