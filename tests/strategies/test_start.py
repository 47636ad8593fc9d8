"""What clients are given: FSLoRA's sketch, remainders, folded parts."""

import pytest
import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.estimator.plan import Plan
from rankfit.strategies.methods import find
from rankfit.strategies.start import Drawn, Leading, LeadingOnFolded

R, SCALE = 6, 2.0
MODULES = ("layer.0.q", "layer.1.q")


def adapter(rank: int = R, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        m: Factors(
            torch.randn(9, rank, generator=generator), torch.randn(rank, 7, generator=generator)
        )
        for m in MODULES
    }
    return Adapter(factors, SCALE, {"head.bias": torch.ones(3)})


def plan(rank: int, remainder: int = 0) -> Plan:
    return Plan(dict.fromkeys(MODULES, rank), "both", 8, 1, False, 1, 1, "cap", remainder)


def dense(value: Adapter, module: str) -> Tensor:
    own = value.factors[module]
    return value.scale * own.b.double() @ own.a.double()


def test_a_method_with_a_row_norm_begins_its_rounds_with_rows_of_it() -> None:
    """The products stay, also those of fresh rows (B = 0) and of rows of zeros."""
    whole = adapter()
    own = whole.factors[MODULES[0]]
    own.b[:, 1], own.a[2] = 0.0, 0.0
    found = find("rankfit").split(whole)
    for module in MODULES:
        before, after = dense(whole, module), dense(found, module)
        assert torch.allclose(before, after, rtol=1e-6, atol=1e-6)
    norms = found.factors[MODULES[0]].a.norm(dim=1)
    assert torch.allclose(norms, torch.tensor([1.0, 1, 0, 1, 1, 1]))
    assert found.head is not whole.head and torch.equal(found.head["head.bias"], torch.ones(3))
    assert find("flexlora").split(whole) is whole


@pytest.mark.parametrize("rank", [1, 2, 5, 6])
def test_a_sketch_is_a_true_adapter_of_its_rank_with_one_index_set_for_both(rank: int) -> None:
    """FSLoRA's published code matches no parameter: every client trains full rank. With its
    evident correction A and B would draw different index sets."""
    whole = adapter()
    share = Drawn().share(whole, None, plan(rank), seed=3)
    assert share.given.ranks == dict.fromkeys(MODULES, rank)
    assert share.given.scale == pytest.approx(SCALE * R / rank)
    for module in MODULES:
        drawn = share.indices[module]
        assert len(drawn.unique()) == rank
        assert torch.equal(share.given.factors[module].b, whole.factors[module].b[:, drawn])
        assert torch.equal(share.given.factors[module].a, whole.factors[module].a[drawn])


def test_sketches_are_unbiased_over_draws() -> None:
    """E[s·(R/k)·B[:, I]·A[I, :]] = s·B·A."""
    whole, draws = adapter(), 4000
    mean = torch.zeros(9, 7, dtype=torch.float64)
    for seed in range(draws):
        mean += dense(Drawn().share(whole, None, plan(2), seed).given, MODULES[0]) / draws
    exact = dense(whole, MODULES[0])
    assert float((mean - exact).norm() / exact.norm()) < 0.05


def test_draws_differ_by_seed_and_repeat_with_it() -> None:
    seen = {
        tuple(Drawn().share(adapter(), None, plan(3), seed).indices[MODULES[0]].tolist())
        for seed in range(40)
    }
    assert len(seen) > 10
    one, two = (Drawn().share(adapter(), None, plan(3), 5).indices for _ in range(2))
    assert torch.equal(one[MODULES[0]], two[MODULES[0]])


def test_the_tail_holds_what_the_trained_part_lacks() -> None:
    whole = adapter()
    share = Leading().share(whole, None, plan(2, remainder=R), 0)
    assert share.given.ranks == dict.fromkeys(MODULES, 2) and share.frozen is not None
    for module in MODULES:
        both = dense(share.given, module) + dense(share.frozen, module)
        assert torch.allclose(both, dense(whole, module))
    assert share.travels.ranks == whole.ranks
    assert Leading().share(whole, None, plan(2), 0).frozen is None


def test_the_folded_part_travels_behind_the_trained_one() -> None:
    whole, folded = adapter(), Adapter(adapter(4, seed=9).factors, SCALE)
    share = LeadingOnFolded().share(whole, folded, plan(2, remainder=7), 0)
    assert share.travels.ranks == dict.fromkeys(MODULES, 6)
    assert share.travels.cut(dict.fromkeys(MODULES, 2)).ranks == share.given.ranks
    rest = share.travels.rest(dict.fromkeys(MODULES, 2))
    assert torch.equal(rest.factors[MODULES[0]].b, folded.factors[MODULES[0]].b)
    first = LeadingOnFolded().share(whole, None, plan(2, remainder=7), 0)
    assert first.travels.ranks == first.given.ranks
