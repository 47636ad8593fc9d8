import gc

import pytest
import torch
from torch import nn

from rankfit.estimator.recording import LiveMemory


def test_counts_storages_not_views():
    with LiveMemory() as live:
        x = torch.zeros(10, 10)
        y = x.view(100)[3:7]
        assert live.current == 400
        del x
        assert live.current == 400, "the view keeps the storage"
        del y
        assert live.current == 0
    assert live.peak == 400


def test_peak_holds_what_autograd_saves():
    x = torch.ones(100, requires_grad=True)
    with LiveMemory().count([x]) as live:
        loss = x.exp().sum()  # exp saves its result
        assert live.current == 400 + 400 + 4
        loss.backward()
        del loss
        assert live.current == 800, "the parameter and its gradient"
    assert live.peak >= 1200


def test_reset_peak():
    with LiveMemory() as live:
        torch.zeros(1000)
        assert live.peak == 4000
        live.reset_peak()
        assert live.peak == 0


def test_baseline_counts_parameters_buffers_and_gradients_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 4)).sum().backward()
    parameters = sum(p.numel() * 4 for p in model.parameters())
    buffers = 4 * 4 + 4 * 4 + 8
    live = LiveMemory().baseline(model).baseline(model)
    assert live.current == 2 * parameters + buffers


def test_releases_after_the_context_count_too():
    with LiveMemory() as live:
        x = torch.zeros(100)
    assert live.current == 400
    del x
    assert live.current == 0


def test_runs_out_at_its_cap_and_recovers():
    live = LiveMemory(cap_bytes=1000)
    with live:
        kept = torch.zeros(200)
        with pytest.raises(torch.OutOfMemoryError, match="1600 bytes.*declared to have 1000"):
            torch.zeros(200)
        gc.collect()
        assert live.current == 800
        torch.zeros(50)
    assert kept.numel() == 200


def test_runs_out_inside_backward():
    x = torch.ones(100, requires_grad=True)
    with LiveMemory(cap_bytes=1300).count([x]):
        loss = (x.exp() * 2).sum()
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()


@pytest.mark.parametrize("cap", [0, -5])
def test_a_cap_must_be_above_zero(cap: int):
    with pytest.raises(ValueError, match=f"cap_bytes is {cap}"):
        LiveMemory(cap_bytes=cap)
