"""Plans stay within memory, upload and download in every round of every method."""

from dataclasses import replace
from functools import cache

import pytest

from rankfit.adapters.names import Rates
from rankfit.configs.settings import ConfigError, RunSettings, from_flat
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.plan import Plan
from rankfit.estimator.plan_search import Estimator
from rankfit.estimator.round_time import link_bytes
from rankfit.estimator.tracer import TraceCache
from rankfit.strategies.allocation import Budget
from rankfit.strategies.methods import configured, find, methods
from rankfit.strategies.planner import Planner
from tests.estimator.small import device, images, vit_config

RANK = 8
FLEET = {"weak": (5.0, 0.8, 10.0), "slow": (64.0, 1.3, 10.0), "strong": (64.0, 12.0, 10.0)}


@cache
def traces() -> TraceCache:
    return TraceCache()


def run_settings(**flat: object) -> RunSettings:
    base = {
        "lora.rank": RANK,
        "train.batch-size": 8,
        "plan.upload-seconds": 0.02,
        "method.warm-up-rounds": 2,
        "method.renew-every": 2,
    }
    return from_flat(base | flat)  # type: ignore[arg-type]


def planner(settings: RunSettings) -> Planner:
    method = configured(find(settings.method.name), settings)
    estimator = Estimator.for_run(
        settings, vit_config(), images(16), whole_head=method.rates.whole_head, traces=traces()
    )
    return Planner(settings, method, estimator)


def fleet(**changes: tuple[float, float, float]) -> dict[str, DeviceReport]:
    return {
        name: device(memory, upload_mbps=up, download_mbps=down)
        for name, (memory, up, down) in (FLEET | changes).items()
    }


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("download", [0.0, 0.08])
def test_every_plan_of_every_round_keeps_every_budget(name: str, download: float) -> None:
    chosen = {"method.name": name, "lora.form": find(name).form}
    settings = run_settings(**chosen, **{"plan.download-seconds": download})
    own, reports = planner(settings), fleet()
    own.scores = {m: float(i) for i, m in enumerate(own._estimator(("both",)).spec.targets)}
    for number in range(1, 7):
        stage = own._method.schedule(number, settings)
        try:
            plans = own.plan_fleet(reports, number)
        except ConfigError as error:
            assert name in ("flora", "fedex-lora") and "folds" in str(error)
            return
        for client, plan in plans.items():
            report = reports[client]
            budget = Budget(own._estimator(stage.phases), report, plan, own._method.start.folds)
            assert plan.trainable == stage.trainable
            assert plan.peak_bytes <= report.budget_bytes
            up = budget.upload_bytes(plan.ranks, (plan.trainable,))
            assert up <= link_bytes(0.02, report.upload_mbps)
            if download:
                assert budget.download_bytes(plan.ranks) <= link_bytes(0.08, report.download_mbps)
            assert min(plan.ranks.values()) >= 1 and max(plan.ranks.values()) <= RANK


def test_the_warm_up_of_hralora_has_less_rank_than_its_alternation() -> None:
    """Twice the bytes come back in the warm-up: the paper doubles the rank there."""
    own = planner(run_settings(**{"method.name": "hralora"}))
    warm, after = (own.plan_fleet(fleet(), number)["slow"] for number in (1, 3))
    assert warm.trainable == "both" and after.trainable == "b"
    targets = len(warm.ranks)
    assert sum(after.ranks.values()) / targets > 1.5 * sum(warm.ranks.values()) / targets


def test_what_cannot_be_sent_folded_is_a_clear_error() -> None:
    settings = run_settings(**{"method.name": "flora", "plan.download-seconds": 0.01})
    with pytest.raises(
        ConfigError, match="flora folds what it learns into the base: up to .* byte"
    ):
        planner(settings).plan_fleet(fleet())


def test_the_memory_of_the_folded_part_is_counted() -> None:
    plain = planner(run_settings(**{"method.name": "flexlora"})).plan_fleet(fleet())["strong"]
    folding = planner(run_settings(**{"method.name": "flora"})).plan_fleet(fleet())["strong"]
    assert folding.peak_bytes > plain.peak_bytes and folding.remainder_rank > RANK


def test_a_pruned_client_is_never_planned_above_its_rank_again() -> None:
    own = planner(run_settings(**{"method.name": "hetlora"}))
    own.pruned("strong", 5)
    assert own.plan_fleet(fleet(), 2)["strong"].rank == 5
    other = planner(run_settings(**{"method.name": "hetlora"}))
    other.restore(own.state())
    assert other.plan_fleet(fleet(), 2)["strong"].rank == 5


def test_scores_are_asked_of_the_clients_in_the_round_before_they_are_due() -> None:
    own = planner(run_settings(**{"method.name": "hralora", "method.scores": "clients"}))
    asked = [n for n in range(1, 8) if "scores" in own.plan_fleet(fleet(), n)["strong"].extras]
    assert asked == [2, 4, 6]


def test_clients_that_a_method_leaves_out_are_named(caplog: pytest.LogCaptureFixture) -> None:
    own = planner(run_settings(**{"method.name": "exclusive"}))
    assert set(own.plan_fleet(fleet())) == {"strong"}
    assert own.refused["weak"] == "left out by method exclusive" and own.able == 3


def test_rankfit_brings_a_tail_where_it_costs_no_trained_rank() -> None:
    plans = planner(run_settings(**{"method.name": "rankfit"})).plan_fleet(fleet())
    plain = planner(run_settings(**{"method.name": "flexlora"})).plan_fleet(fleet())
    assert plans["slow"].remainder_rank == RANK and plans["slow"].ranks == plain["slow"].ranks
    assert plans["slow"].peak_bytes > plain["slow"].peak_bytes
    assert not plans["strong"].remainder_rank, "the whole adapter is trained there"
    narrow = fleet(slow=(64.0, 1.3, 0.8))
    settings = run_settings(**{"method.name": "rankfit", "plan.download-seconds": 0.08})
    assert not planner(settings).plan_fleet(narrow)["slow"].remainder_rank
    without = run_settings(**{"method.name": "rankfit", "method.without": "remainder"})
    assert not planner(without).plan_fleet(fleet())["slow"].remainder_rank


def test_a_plan_says_how_fast_its_factors_learn() -> None:
    plans = planner(run_settings(**{"method.name": "rankfit"})).plan_fleet(fleet())
    assert {plan.rates for plan in plans.values()} == {find("rankfit").rates}
    assert {Plan.from_dict(plan.to_dict()) == plan for plan in plans.values()} == {True}
    others = planner(run_settings(**{"method.name": "flexlora"})).plan_fleet(fleet())
    assert {plan.rates for plan in others.values()} == {Rates()}


def test_how_a_head_learns_is_the_methods_choice_or_the_users() -> None:
    for name, moment, whole in (
        ("rankfit", "method", True), ("rankfit", "number", False),
        ("fedit", "method", False), ("fedit", "tensor", True),
    ):  # fmt: skip
        settings = run_settings(**{"method.name": name, "train.head-moment": moment})
        for plan in planner(settings).plan_fleet(fleet()).values():
            assert plan.rates == replace(find(name).rates, whole_head=whole)
    with pytest.raises(ConfigError, match=r"head-moment tensor: only torch's AdamW can, not sgd"):
        run_settings(**{"train.head-moment": "tensor", "train.optimizer": "sgd"})
