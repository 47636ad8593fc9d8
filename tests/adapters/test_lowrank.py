"""All routes to the strongest directions, against a plain SVD in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfit.adapters import lowrank
from rankfit.adapters import lowrank as krylov
from rankfit.adapters.adapter import Factors
from rankfit.adapters.lowrank import Dense, Operator, Spectrum, Stack, exact, iterated, strongest
from rankfit.adapters.merge import ProductSum
from tests.adapters.oracle import best

#: Of the exact routes: distance from the best approximation, relative to it.
EXACT = 1e-5
#: Of the iterated route: total error above the best one, relative to it.
TOLERANCE = 0.005
#: What float32 adds to an error that is (nearly) zero, relative to the matrix.
ROUNDING = 1e-5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def product(found: Spectrum) -> Tensor:
    return (found.u * found.values) @ found.vt


def check(matrix: Operator, found: Spectrum, rank: int, within: float) -> None:
    """The total error is at most the best one's, times 1 + ``within``, but for rounding."""
    whole = matrix.dense()
    least = torch.linalg.norm(whole - best(whole, rank))
    error = torch.linalg.norm(whole - product(found))
    assert error <= least * (1 + within) + ROUNDING * torch.linalg.norm(whole)
    assert bool((found.values[:-1] >= found.values[1:]).all()), "strongest first"
    for side in (found.u, found.vt.T):
        live = side[:, found.values > 1e-5 * found.values[:1]].double()
        torch.testing.assert_close(
            live.T @ live, torch.eye(live.shape[1], dtype=torch.float64), atol=1e-5, rtol=0
        )


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    """Sums of products of clients: any shape, ranks up to the width, dead and equal directions."""
    d, k = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    clients, seed = draw(st.integers(1, 8)), draw(st.integers(0, 10_000))
    random, lefts, rights, weights = generator(seed), [], [], []
    for _ in range(clients):
        rank = draw(st.integers(1, min(d, k)))
        kind = draw(st.sampled_from(["random", "zero", "deficient", "equal", "decaying"]))
        left = torch.randn(d, rank, generator=random)
        right = torch.randn(rank, k, generator=random)
        if kind == "zero":
            left = torch.zeros(d, rank)
        if kind == "deficient":
            left = left[:, :1].expand(d, rank).contiguous()
        if kind == "equal":
            left, right = torch.linalg.qr(left)[0], torch.linalg.qr(right.T)[0].T.contiguous()
        if kind == "decaying":
            left = left * 0.5 ** torch.arange(rank)
        lefts.append(left)
        rights.append(right)
        weights.append(torch.full((rank,), draw(st.floats(0.01, 5.0)), dtype=torch.float64))
    scale = draw(st.sampled_from([1.0, 1e-12, 1e12]))
    return Stack(torch.cat(lefts, 1) * scale, torch.cat(rights, 0), torch.cat(weights))


@settings(max_examples=150, deadline=None)
@given(stacks(), st.integers(1, 64))
def test_the_exact_routes_are_the_best_approximation(stack: Stack, rank: int) -> None:
    rank = min(rank, *stack.shape)
    dense = Dense(stack.dense())
    for found in (
        lowrank._by_qr(stack, rank),
        lowrank._by_square(dense.matrix, rank),
        exact(stack, rank),
        exact(dense, rank),
    ):
        check(stack, found, rank, EXACT)
    if stack.left.shape[1] < min(stack.shape):
        check(stack, lowrank._by_grams(stack, rank), rank, EXACT)


@settings(max_examples=150, deadline=None)
@given(stacks(), st.integers(1, 32), st.booleans())
def test_the_iterated_route_keeps_its_tolerance(stack: Stack, rank: int, warm: bool) -> None:
    rank = min(rank, *stack.shape)
    start = best(stack.dense(), rank).float()[:rank] if warm else None
    for matrix in (stack, Dense(stack.dense().float())):
        found = iterated(matrix, rank, TOLERANCE, generator(1), start)
        if found is not None:
            check(matrix, found, rank, TOLERANCE)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_at_some_size_it_settles_within_its_tolerance(decay: float) -> None:
    random, d, k, n = generator(3), 500, 400, 350
    left = torch.linalg.qr(torch.randn(d, n, generator=random))[0]
    right = torch.linalg.qr(torch.randn(k, n, generator=random))[0].T
    stack = Stack(left * torch.arange(1, n + 1) ** -decay, right, torch.ones(n).double())
    for seed in range(5):
        found = iterated(stack, 32, TOLERANCE, generator(seed))
        assert found is not None
        check(stack, found, 32, TOLERANCE)


def test_a_tolerance_of_zero_is_exact_and_an_unsettled_iteration_falls_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    random = generator(5)
    stack = Stack(
        torch.randn(900, 800, generator=random),
        torch.randn(800, 900, generator=random),
        torch.ones(800).double(),
    )
    reference = best(stack.dense(), 8)
    norm = torch.linalg.norm(reference)
    assert torch.linalg.norm(product(strongest(stack, 8, 0.0, random)) - reference) <= EXACT * norm
    monkeypatch.setattr(krylov, "PAIRS", 1)
    with caplog.at_level("INFO"):
        found = strongest(stack, 8, 1e-6, random)
    assert "decomposed exactly" in caplog.text
    assert torch.linalg.norm(product(found) - reference) <= EXACT * norm


def test_a_sum_needs_no_more_memory_for_more_terms_and_its_order_is_rounding() -> None:
    random = generator(7)
    terms = [
        (Factors(torch.randn(40, 6, generator=random), torch.randn(6, 30, generator=random)), w)
        for w in torch.rand(50, generator=random).tolist()
    ]
    forward, backward = ProductSum(40, 30), ProductSum(40, 30)
    for (one, weight), (other, other_weight) in zip(terms, reversed(terms), strict=True):
        forward.add(one, weight)
        backward.add(other, other_weight)
        kept = sum(own.b.numel() + own.a.numel() for own, _ in forward._terms)
        assert kept < 30 * (40 + 30)
    truth = sum(weight * own.b.double() @ own.a.double() for own, weight in terms)
    assert isinstance(truth, Tensor)
    norm = torch.linalg.norm(truth)
    assert torch.linalg.norm(forward.dense() - truth) <= 1e-6 * norm
    assert torch.linalg.norm(backward.dense() - forward.dense()) <= 1e-6 * norm


def test_equal_sums_are_equal_to_the_last_bit() -> None:
    random = generator(9)
    terms = [
        Factors(torch.randn(200, 9, generator=random), torch.randn(9, 150, generator=random))
        for _ in range(40)
    ]
    found = []
    for _ in range(2):
        total = ProductSum(200, 150)
        for own in terms:
            total.add(own, 0.3)
        found.append(total.strongest(16, TOLERANCE, generator(2)))
    assert torch.equal(found[0].u, found[1].u) and torch.equal(found[0].vt, found[1].vt)
