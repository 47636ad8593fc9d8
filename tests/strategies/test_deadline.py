"""Plans for a deadline: by the throughput that a client's own rounds were measured at."""

import pytest

from rankfit.configs.settings import ConfigError
from rankfit.strategies.planner import Planner
from rankfit.strategies.training_round import spent
from tests.strategies.test_planning import fleet, planner, run_settings

DEADLINE = {"plan.deadline-seconds": 10.0, "plan.upload-seconds": 0.0}


def seconds_at(own: Planner, rank: float) -> float:
    """Seconds of the full rank with which just this rank is in time."""
    work = own._estimator(("both",)).work(own._estimator(("both",)).steps[0])
    return 10.0 * work.flops(8) / work.flops(rank)


@pytest.mark.parametrize("method", ["flexlora", "hralora", "rankfit"])
def test_a_slow_client_gets_less_rank_from_the_next_round_on(method: str) -> None:
    own = planner(run_settings(**DEADLINE, **{"method.name": method}))
    own.scores = {m: float(i) for i, m in enumerate(own._estimator(("both",)).spec.targets)}
    first = own.plan_fleet(fleet())["strong"]
    assert first.rank == 8
    own.timed("strong", first, seconds_at(own, 4.5), 100)
    second = own.plan_fleet(fleet())
    throughput = own._throughputs["strong"]
    assert throughput.seconds(own._estimator(("both",)).flops(second["strong"])) <= 10.0
    assert second["slow"].rank == own.plan_fleet(fleet(), 1)["slow"].rank


def test_paces_are_a_mean_and_survive_a_resume() -> None:
    own = planner(run_settings(**DEADLINE, **{"method.name": "flexlora"}))
    plan = own.plan_fleet(fleet())["strong"]
    for seconds in (10.0, 30.0):
        own.timed("strong", plan, seconds, 100)
    flops = 100 * own._estimator(("both",)).flops(plan)
    assert own._throughputs["strong"].flops_per_second == pytest.approx(
        (flops / 10 + flops / 30) / 2
    )
    again = planner(run_settings(**DEADLINE, **{"method.name": "flexlora"}))
    again.restore(own.state())
    assert again._throughputs == own._throughputs


def test_without_a_deadline_no_pace_is_kept() -> None:
    own = planner(run_settings(**{"method.name": "flexlora"}))
    own.timed("strong", own.plan_fleet(fleet())["strong"], 10.0, 100)
    assert own.state() == {"ceilings": {}}


def test_a_client_that_is_too_slow_for_anything_is_named() -> None:
    own = planner(run_settings(**DEADLINE, **{"method.name": "flexlora"}))
    plan = own.plan_fleet(fleet())["strong"]
    own.timed("strong", plan, 1000.0, 100)
    assert "strong" not in own.plan_fleet(fleet())
    assert "GFLOP/s; plan.deadline-seconds allows 10" in own.refused["strong"]
    for client in ("weak", "slow"):
        own.timed(client, plan, 1000.0, 100)
    with pytest.raises(ConfigError, match="no device can train"):
        own.plan_fleet(fleet())


def test_samples_of_a_round() -> None:
    metrics = {"num-examples": 100, "train-seconds": 2.5}
    assert spent(run_settings(**{"train.epochs": 3}), metrics) == (2.5, 300)
    assert spent(run_settings(**{"train.steps": 5}), metrics) == (2.5, 40)
