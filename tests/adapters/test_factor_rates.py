"""Rates that are one speed at every rank and width."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rankfit.adapters import names
from rankfit.adapters.names import Rates
from rankfit.strategies.methods import methods

RATE, STEP = 0.01, 4.0
A, B, HEAD = names.a_name("layer"), names.b_name("layer"), names.head_name("classifier.weight")


def named(width: int, rank: int = 3) -> dict[str, nn.Parameter]:
    return {
        A: nn.Parameter(torch.randn(rank, width)),
        B: nn.Parameter(torch.randn(5, rank)),
        HEAD: nn.Parameter(torch.randn(2, 5)),
        names.head_name("classifier.bias"): nn.Parameter(torch.randn(2)),
    }


def first_step(throughput: Rates, own: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """By how much the first step of Adam moves each tensor: each number by its rate."""
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer = torch.optim.AdamW(throughput.groups(own.items(), RATE), lr=1.0, weight_decay=0.0)
    for parameter in own.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {name: (parameter.detach() - before[name]).abs() for name, parameter in own.items()}


def every(tensor: torch.Tensor, value: float) -> None:
    torch.testing.assert_close(tensor, torch.full_like(tensor, value), rtol=1e-3, atol=0)


@pytest.mark.parametrize("width", [16, 64, 768, 4096])
def test_a_step_moves_a_row_by_the_same_norm_at_every_width(width: int) -> None:
    moved = first_step(Rates(0.0, STEP), named(width))
    every(moved.pop(A).norm(dim=1), STEP * RATE)
    for change in moved.values():
        every(change, RATE)


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_factors_of_a_higher_rank_learn_slower_and_the_head_does_not(rank: int) -> None:
    moved = first_step(Rates(0.5, STEP), named(64, rank))
    every(moved.pop(A).norm(dim=1), STEP * RATE / rank**0.5)
    every(moved.pop(B), RATE / rank**0.5)
    for change in moved.values():
        every(change, RATE)


def test_modules_of_several_ranks_have_rates_of_their_own() -> None:
    own = named(64, 4) | {names.b_name("other"): nn.Parameter(torch.randn(5, 16))}
    moved = first_step(Rates(0.5), own)
    every(moved[B], RATE / 2)
    every(moved[names.b_name("other")], RATE / 4)


def test_narrow_layers_and_methods_without_it_learn_at_one_rate() -> None:
    assert Rates(0.0, STEP).a(3, 9) == 1.0
    (group,) = Rates().groups(named(4096).items(), RATE)
    assert group["lr"] == RATE and len(group["params"]) == 4


def test_only_rankfit_has_such_rates_and_can_be_told_not_to() -> None:
    found = methods()
    paced = {name for name, method in found.items() if method.rates != Rates()}
    assert paced == {"rankfit"}
    own = found["rankfit"]
    assert own.parts["slow-rows"](own).rates == replace(own.rates, row_step=0.0)
    assert own.parts["rank-rates"](own).rates == replace(own.rates, rank_power=0.0)
    assert own.parts["whole-head"](own).rates == replace(own.rates, whole_head=False)
