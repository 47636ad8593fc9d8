"""Terms and losses of local training against autograd and their formulas."""

import pytest
import torch
from torch import nn

from rankfit.client.regularizers import Proximal, RankDecay, cut_state, pruned_rank
from rankfit.client.trainer import prior_adjusted

A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = {
        A: nn.Parameter(torch.randn(4, 6, generator=generator)),
        B: nn.Parameter(torch.randn(5, 4, generator=generator)),
    }
    for parameter in found.values():
        parameter.grad = torch.ones_like(parameter)
    return found


def test_the_proximal_term_is_fedproxs() -> None:
    own = parameters()
    start = {name: torch.zeros_like(p) + 0.5 for name, p in own.items()}
    Proximal(own, start, 0.3).add_gradients()
    for name, parameter in own.items():
        exact = torch.autograd.grad(0.15 * (parameter - start[name]).square().sum(), parameter)[0]
        assert parameter.grad is not None and torch.allclose(parameter.grad, 1 + exact)


def test_rank_decay_is_the_product_of_the_norms_of_what_would_be_pruned() -> None:
    own = parameters()
    term = RankDecay(own, keep=2, weight=0.7)
    value = own[B][:, 2:].norm() * own[A][2:].norm()
    assert term.value() == pytest.approx(float(value))
    exact = torch.autograd.grad(0.7 * value, [own[A], own[B]])
    term.add_gradients()
    for name, gradient in zip((A, B), exact, strict=True):
        grad = own[name].grad
        assert grad is not None and torch.allclose(grad, 1 + gradient, atol=1e-6)


def test_a_client_prunes_when_the_last_directions_have_lost_weight() -> None:
    own = parameters()
    term = RankDecay(own, keep=3, weight=1.0)
    assert not term.prunes()
    with torch.no_grad():
        own[B][:, 3:] *= 0.5
    assert term.prunes()
    cut = cut_state({A: own[A].data, B: own[B].data, "base_model.model.head": torch.ones(2)}, 3)
    assert cut[A].shape == (3, 6) and cut[B].shape == (5, 3)


def test_a_direction_of_zeros_is_no_division_by_zero() -> None:
    own = parameters()
    with torch.no_grad():
        own[B].zero_()
    RankDecay(own, keep=2, weight=1.0).add_gradients()
    assert all(bool(torch.isfinite(p.grad).all()) for p in own.values() if p.grad is not None)


@pytest.mark.parametrize(("rank", "kept"), [(1, 1), (2, 1), (8, 7), (200, 198), (1000, 990)])
def test_pruning_takes_at_least_one_and_leaves_at_least_one(rank: int, kept: int) -> None:
    assert pruned_rank(rank, 0.99) == kept


def test_the_label_aware_loss_adds_the_clients_log_prior_to_the_logits() -> None:
    labels = torch.tensor([0, 0, 0, 2])

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return type("Output", (), {"logits": x})

    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, 0.5]])
    loss = prior_adjusted(labels, 3, weight=1.5)(
        Model(), {"x": logits, "labels": torch.tensor([0, 2])}
    )
    prior = torch.tensor([4 / 7, 1 / 7, 2 / 7])
    exact = torch.log_softmax(logits + 1.5 * prior.log(), 1)
    assert float(loss) == pytest.approx(float(-(exact[0, 0] + exact[1, 2]) / 2))
