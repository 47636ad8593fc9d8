"""Server optimizers, folding and moving averages against dense oracles, and their state."""

import pytest
import torch
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import AverageFactors, Merge, Update
from rankfit.adapters.product_merges import MeanProduct, Stacked
from rankfit.configs.settings import ConfigError, RunSettings, from_flat
from rankfit.strategies.server_update import ServerUpdate
from tests.adapters.oracle import best

D, K, R, SCALE = 8, 6, 3, 2.0
M = "layer.q"


def run_settings(**server: object) -> RunSettings:
    flat = {f"server.{k.replace('_', '-')}": v for k, v in server.items()}
    return from_flat({"lora.rank": R, "lora.alpha": SCALE * R, **flat})  # type: ignore[arg-type]


def adapter(seed: int, rank: int = R) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(D, rank, generator=generator), torch.randn(rank, K, generator=generator)
    return Adapter({M: Factors(b, a)}, SCALE, {"head": torch.randn(4, generator=generator)})


def merged(kind: type[Merge], reference: Adapter, target: Adapter) -> Merge:
    merge = kind(reference, 0)
    merge.add(Update(reference, target, 5.0))
    return merge


def dense(value: Adapter) -> Tensor:
    own = value.factors[M]
    return value.scale * own.b.double() @ own.a.double()


def steps(name: str, targets: list[Tensor], start: Tensor) -> list[Tensor]:
    """FedOpt written out, for one tensor."""
    x, m, v, found = start.clone(), torch.zeros_like(start), torch.zeros_like(start), []
    for target in targets:
        delta = target - x
        if name == "sgd":
            x = x + 0.5 * delta
        elif name == "momentum":
            m = 0.9 * m + delta
            x = x + 0.5 * m
        else:
            m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
            x = x + 0.5 * m / (v.sqrt() + 1e-3)
        found.append(x)
    return found


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_server_optimizers_step_on_the_factors_where_these_keep_their_directions(name: str) -> None:
    advance = ServerUpdate(run_settings(optimizer=name, learning_rate=0.5), folds=False)
    current, targets = adapter(0), [adapter(seed) for seed in (1, 2, 3)]
    expected = steps(name, [t.factors[M].b for t in targets], current.factors[M].b)
    heads = steps(name, [t.head["head"] for t in targets], current.head["head"])
    for target, b, head in zip(targets, expected, heads, strict=True):
        current = advance(merged(AverageFactors, current, target))
        assert torch.allclose(current.factors[M].b, b, atol=1e-5)
        assert torch.allclose(current.head["head"], head, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_server_optimizers_step_on_products_where_factors_are_rotated(name: str) -> None:
    advance = ServerUpdate(run_settings(optimizer=name, learning_rate=0.5), folds=False)
    current, target = adapter(0), adapter(1)
    expected = steps(name, [dense(target) / SCALE], dense(current) / SCALE)[0] * SCALE
    found = advance(merged(MeanProduct, current, target))
    assert torch.allclose(dense(found), best(expected, R), atol=1e-4)


def test_without_an_optimizer_the_merge_goes_through() -> None:
    target = adapter(1)
    found = ServerUpdate(run_settings(), folds=False)(merged(AverageFactors, adapter(0), target))
    assert torch.allclose(found.factors[M].b, target.factors[M].b)


def test_the_moving_average_is_of_products_and_heads() -> None:
    advance = ServerUpdate(run_settings(average=0.8), folds=False)
    current, exact, head = adapter(0), None, None
    for seed in (1, 2, 3, 4):
        current = advance(merged(AverageFactors, current, adapter(seed)))
        now, top = dense(current), current.head["head"]
        exact = now if exact is None else 0.8 * exact + 0.2 * now
        head = top if head is None else 0.8 * head + 0.2 * top
    assert exact is not None and head is not None
    exported = advance.exported(current)
    assert exported.ranks == current.ranks
    assert torch.allclose(dense(exported), best(exact, R), atol=1e-4)
    assert torch.allclose(exported.head["head"], head)
    assert not torch.allclose(dense(exported), dense(current), atol=1e-2)


def test_what_is_folded_is_exported_with_the_adapter() -> None:
    advance = ServerUpdate(run_settings(), folds=True)
    current, exact = adapter(0), torch.zeros(D, K, dtype=torch.float64)
    for seed in (1, 2, 3, 4):
        exact = exact + dense(adapter(seed))
        current = advance(merged(Stacked, current, adapter(seed)))
        assert torch.allclose(dense(advance.exported(current)), exact, atol=1e-4)


def test_a_round_without_updates_moves_nothing() -> None:
    advance = ServerUpdate(run_settings(optimizer="momentum"), folds=False)
    current = advance(merged(AverageFactors, adapter(0), adapter(1)))
    assert advance(AverageFactors(current, 0)) is current


@pytest.mark.parametrize("kind", [AverageFactors, MeanProduct, Stacked])
def test_the_state_goes_on_exactly_after_a_restore(kind: type[Merge]) -> None:
    optimizer = "none" if kind is Stacked else "adam"
    run = run_settings(optimizer=optimizer, average=0.7)
    one = ServerUpdate(run, folds=kind is Stacked)
    current = one(merged(kind, adapter(0), adapter(1)))
    other = ServerUpdate(run, folds=kind is Stacked)
    other.restore({name: tensor.clone() for name, tensor in one.state().items()}, 1)
    left, right = (each(merged(kind, current, adapter(2))) for each in (one, other))
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name])
    for name, tensor in one.exported(left).state_dict().items():
        assert torch.equal(tensor, other.exported(right).state_dict()[name])


def test_a_server_optimizer_is_refused_where_the_adapter_starts_anew() -> None:
    with pytest.raises(ConfigError, match="cannot be used with"):
        ServerUpdate(run_settings(optimizer="adam"), folds=True)
