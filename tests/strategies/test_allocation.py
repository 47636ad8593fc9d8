"""Allocations and schedules: budgets kept, no rank negative, no loop without end."""

import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfit.configs.settings import ConfigError, RunSettings, from_flat
from rankfit.strategies.allocation import (
    AllocationContext,
    FisherShares,
    OneRank,
    OnlyFullRank,
    OwnRank,
    TopLayersRising,
    clusters,
    draw_layers,
    heaviest,
    pattern_weights,
    shared_ranks,
)
from rankfit.strategies.methods import configured, find, methods

LAYERS = 12


def choice(
    largest: dict[str, int], rank: int = 48, number: int = 1, **extra: object
) -> AllocationContext:
    flat = {"lora.rank": rank, **extra.pop("flat", {})}  # type: ignore[dict-item]
    modules = tuple(f"encoder.layer.{i}.{part}" for i in range(LAYERS) for part in ("q", "v"))
    return AllocationContext(largest, modules, number, from_flat(flat), **extra)  # type: ignore[arg-type]


def scored(values: list[float], **changes: object) -> AllocationContext:
    scores = {f"encoder.layer.{i}.{part}": v / 2 for i, v in enumerate(values) for part in "qv"}
    return choice({"weak": 24, "middle": 36, "strong": 48}, number=21, scores=scores, **changes)


def test_modules_are_grouped_by_layer() -> None:
    layers = choice({}).layers
    assert len(layers) == LAYERS
    assert layers[10] == ("encoder.layer.10.q", "encoder.layer.10.v")


def test_one_rank_is_the_weakest_clients_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """FedIT at mixed ranks: the documented fallback."""
    with caplog.at_level(logging.INFO):
        ranks = OneRank().ranks(choice({"a": 3, "b": 8}))
    assert set(ranks["a"].values()) == set(ranks["b"].values()) == {3}
    assert "one rank for all: 3, what the weakest of the clients can train" in caplog.text


def test_exclusive_takes_only_clients_of_full_rank_and_says_so_when_there_is_none() -> None:
    assert set(OnlyFullRank().ranks(choice({"a": 47, "b": 48}))) == {"b"}
    with pytest.raises(ConfigError, match="no client can train lora.rank 48, the largest is 47"):
        OnlyFullRank().ranks(choice({"a": 47}))


def test_legend_goes_from_the_top_down_with_ranks_that_rise() -> None:
    ranks = TopLayersRising().ranks(choice({"weak": 6, "strong": 48}))
    depth = [ranks["strong"].get(f"encoder.layer.{i}.q", 0) for i in range(LAYERS)]
    assert depth == [4 * (i + 1) for i in range(LAYERS)]
    weak = [ranks["weak"].get(f"encoder.layer.{i}.q", 0) for i in range(LAYERS)]
    assert weak == [0] * 11 + [48], "72 units: 48 for the top layer, too few left for the next"


@given(st.integers(1, 48), st.sampled_from(["legend", "hralora", "fed-hello-fim"]), st.data())
@settings(deadline=None, max_examples=80)
def test_no_allocation_spends_more_than_rank_times_layers(
    rank: int, name: str, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.floats(0, 1e6), min_size=LAYERS, max_size=LAYERS))
    case = scored(values)
    case = AllocationContext({"a": rank, "b": 48}, case.modules, 21, case.settings, case.scores)
    for client, ranks in find(name).allocate.ranks(case).items():
        assert ranks and min(ranks.values()) >= 1 and max(ranks.values()) <= 48
        assert sum(ranks.values()) <= 2 * case.budget(client)


def test_hralora_keeps_to_the_papers_example() -> None:
    """Budgets 288/432/576 of cap 48: 6, 9 and 12 of 12 layers, at least 10 each."""
    ranks = FisherShares().ranks(scored([float(i + 1) for i in range(LAYERS)]))
    counts = {client: len(own) // 2 for client, own in ranks.items()}
    assert counts == {"weak": 6, "middle": 9, "strong": 12}
    assert all(10 <= rank <= 48 for own in ranks.values() for rank in own.values())
    assert sum(ranks["weak"].values()) == 2 * 288, "all of the budget is spent"


def test_hralora_warms_up_with_all_layers_and_redraws_every_period() -> None:
    warm = AllocationContext({"a": 8}, choice({}).modules, 20, from_flat({"lora.rank": 48}))
    assert set(FisherShares().ranks(warm)["a"].values()) == {8}
    run = from_flat({"lora.rank": 48})
    due = [n for n in range(1, 70) if FisherShares().scored(n, run)]
    assert due == [21, 41, 61]


@pytest.mark.parametrize("values", [[0.0] * LAYERS, [5.0] * LAYERS, [0.0] * 11 + [1e300]])
def test_hralora_never_divides_by_a_zero_total(values: list[float]) -> None:
    ranks = FisherShares().ranks(scored(values))
    assert all(rank >= 1 for own in ranks.values() for rank in own.values())


@given(
    st.lists(st.floats(0, 1e9), min_size=1, max_size=24),
    st.integers(1, 20),
    st.integers(0, 60),
    st.integers(0, 3000),
)
@settings(deadline=None)
def test_shares_are_never_negative_never_above_the_cap_or_the_budget(
    scores: list[float], least: int, above: int, extra: int
) -> None:
    """The published code gives negative ranks, and loops for ever on budgets above cap·layers."""
    cap, budget = least + above, least * len(scores) + extra
    ranks = shared_ranks(scores, budget, least, cap)
    assert all(least <= rank <= cap for rank in ranks)
    assert sum(ranks) == min(budget, cap * len(scores))


def test_a_budget_below_one_rank_per_layer_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="a budget of 5 cannot give 3 layers 2 each"):
        shared_ranks([1.0, 2.0, 3.0], 5, 2, 8)


def test_higher_scores_get_more() -> None:
    assert shared_ranks([1.0, 2.0, 5.0], 40, 2, 30) == [6, 10, 24]


def test_clusters_are_the_optimal_ones_from_the_lowest() -> None:
    assert clusters([0.1, 9.0, 0.2, 5.0, 5.1, 0.15], 3) == [0, 2, 0, 1, 1, 0]
    assert clusters([1.0, 1.0, 1.0], 3) == [0, 0, 0]
    assert clusters([1.0, 2.0], 3) == [0, 1]


def test_layers_are_drawn_by_their_weights() -> None:
    drawn = Counter(i for seed in range(3000) for i in draw_layers([1.0, 2.0, 3.0], 1, seed))
    assert [drawn[i] / 3000 for i in range(3)] == pytest.approx([1 / 6, 1 / 3, 1 / 2], abs=0.03)
    assert draw_layers([0.0, 0.0], 1, 3) == draw_layers([0.0, 0.0], 1, 3)
    assert draw_layers([0.0, 1.0, 0.0], 3, 0) == [0, 1, 2]


def test_patterns_of_fed_hello() -> None:
    assert heaviest("triangle", 6, 2) == [0, 1]
    assert heaviest("inverted-triangle", 6, 2) == [4, 5]
    assert heaviest("bottleneck", 6, 3) == [0, 4, 5]
    assert heaviest("uniform", 6, 3) == [1, 3, 5]
    for pattern in ("triangle", "inverted-triangle", "bottleneck", "uniform"):
        assert len(pattern_weights(pattern, 7)) == 7 and min(pattern_weights(pattern, 7)) > 0
        for count in range(1, 8):
            assert len(heaviest(pattern, 7, count)) == count


def test_fed_hello_gives_whole_layers_at_the_global_rank() -> None:
    ranks = find("fed-hello-gd").allocate.ranks(choice({"weak": 8, "tiny": 1, "strong": 48}))
    assert ranks["weak"] == {f"encoder.layer.{i}.{p}": 48 for i in (10, 11) for p in "qv"}
    assert set(ranks["tiny"].values()) == {12}, "less than a layer at rank 48: one at rank 12"
    assert len(ranks["strong"]) == 2 * LAYERS


def moves(name: str, rounds: int, **flat: object) -> str:
    run = from_flat({f"method.{key}": value for key, value in flat.items()})  # type: ignore[misc]
    schedule = configured(find(name), run).schedule
    return " ".join(schedule(number, run).trainable for number in range(1, rounds + 1))


def test_schedules() -> None:
    assert moves("fedit", 3) == "both both both"
    assert moves("ffa-lora", 3) == "b b b"
    assert moves("rolora", 4) == "b a b a"
    warm = {"warm-up-rounds": 2}
    assert moves("hralora", 5, **warm) == "both both b a b"
    assert moves("hralora", 3, **warm | {"without": "alternation"}) == "both both both"
    assert moves("hralora", 2, **{"warm-up-rounds": 0}) == "b a"


def test_a_plan_of_the_warm_up_is_priced_with_both_factors_moving() -> None:
    """HRALoRA doubles the rank in the warm-up, and its upload budget breaks."""
    run = from_flat({"method.warm-up-rounds": 2})
    schedule = find("hralora").schedule
    assert schedule(2, run).phases == ("both",)
    assert schedule(3, run).phases == schedule(4, run).phases == ("b", "a")


def test_parts_can_be_switched_off_and_unknown_ones_are_refused() -> None:
    run = from_flat({"method.name": "hralora", "method.without": "fisher, refactorisation"})
    ablated = configured(find("hralora"), run)
    assert isinstance(ablated.allocate, OwnRank) and ablated.merge is not find("hralora").merge
    bad = from_flat({"method.name": "fedit", "method.without": "fisher"})
    with pytest.raises(ConfigError, match="fedit has no part 'fisher'.*it has: none"):
        configured(find("fedit"), bad)


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "fslora"])
def test_a_tail_is_refused_where_it_has_no_place(name: str) -> None:
    run = from_flat({"method.name": name, "method.remainder": True})
    with pytest.raises(ConfigError, match=f"method.remainder cannot be used with {name}"):
        configured(find(name), run)


def test_every_method_says_what_it_is() -> None:
    for name, method in methods().items():
        assert method.name == name and method.summary.endswith(".") and method.source
    assert {"fedit", "straggler", "exclusive", "ffa-lora", "rolora", "legend", "hetlora", "rbla",
            "fed-hello-fim", "fed-hello-gd", "fed-hello-rgd", "flexlora", "raflora", "flora",
            "fedex-lora", "fslora", "hralora", "rankfit"} <= set(methods())  # fmt: skip


def test_settings_of_methods_are_checked() -> None:
    assert RunSettings().method.renew_every == 20
    with pytest.raises(ConfigError, match=r"method.pattern.*got 'square'"):
        from_flat({"method.pattern": "square"})
