"""AdamW with one second moment for a tensor, against its formula."""

import copy

import pytest
import torch
from torch import Tensor, nn

from rankfit.adapters.names import WHOLE
from rankfit.tasks.optimizers import build_optimizer

RATE, DECAY = 0.01, 0.1


def built(name: str, whole: nn.Parameter, other: nn.Parameter) -> torch.optim.Optimizer:
    groups = [{"params": [other], "lr": RATE / 2}, {"params": [whole], "lr": RATE, WHOLE: True}]
    return build_optimizer(name, groups, rate=RATE, decay=DECAY)


def expected(start: Tensor, gradients: list[Tensor], rate: float, *, whole: bool) -> Tensor:
    """The formula in float64, step by step."""
    found, mean, square = start.double(), torch.zeros(()), torch.zeros(())
    for count, gradient in enumerate((g.double() for g in gradients), start=1):
        now = gradient.square().mean() if whole else gradient.square()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * now
        step = (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        found = found * (1 - rate * DECAY) - rate * step
    return found.float()


@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
def test_marked_tensors_share_a_moment_and_the_others_are_adamws(name: str) -> None:
    torch.manual_seed(0)
    whole, other = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(4, 3))
    starts = [p.detach().clone() for p in (whole, other)]
    gradients = [[torch.randn(p.shape) * 10**-i for i in range(6)] for p in (whole, other)]
    optimizer = built(name, whole, other)
    for first, second in zip(*gradients, strict=True):
        whole.grad, other.grad = first.clone(), second.clone()
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as Accelerate does
    torch.testing.assert_close(whole.data, expected(starts[0], gradients[0], RATE, whole=True))
    torch.testing.assert_close(
        other.data, expected(starts[1], gradients[1], RATE / 2, whole=False), rtol=1e-5, atol=1e-6
    )
    assert optimizer.state[whole]["exp_avg_sq"].shape == ()
    assert optimizer.state[other]["exp_avg_sq"].shape == other.shape


def test_a_class_that_is_hardly_there_hardly_moves() -> None:
    """A client without one class: its row has a thousandth of the gradient of the others."""
    gradient = torch.randn(4, 6)
    gradient[3] *= 1e-3
    moved = {}
    for whole in (True, False):
        head = nn.Parameter(torch.zeros(4, 6))
        group = {"params": [head], "lr": RATE} | ({WHOLE: True} if whole else {})
        optimizer = build_optimizer("adamw", [group], rate=RATE)
        head.grad = gradient.clone()
        optimizer.step()
        moved[whole] = head.detach()
    assert moved[True].norm() == pytest.approx(float(moved[False].norm()), rel=1e-3)
    assert moved[True][3].norm() < 2e-3 * moved[True][:3].norm()
    assert moved[False][3].norm() == pytest.approx(RATE * 6**0.5, rel=1e-3)


def test_a_step_that_overflowed_is_left_out() -> None:
    whole, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = built("adamw-fused", whole, other)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for infinite in (False, True):
        before = [p.detach().clone() for p in (whole, other)]
        loss = whole.sum() * (torch.inf if infinite else 1.0) + other.sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for parameter, old in zip((whole, other), before, strict=True):
            assert torch.equal(parameter, old) == infinite
    assert float(optimizer.state[whole]["step"]) == 1
