"""The strategy under Flower's own loop, ``strategy.start``, beside RankFit's."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, MetricRecord

from rankfit.adapters.wire import decode, encode
from rankfit.server.loop import build, federate
from rankfit.strategies import messages
from tests.server.federation import FaultyGrid, settings_for


def test_flowers_loop_gives_the_adapter_of_ours(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "ours", "server.evaluate=clients", "run.rounds=2")
    ours = federate(FaultyGrid(settings, {}), settings).state_dict()

    other = settings_for(tmp_path, "flowers", "server.evaluate=clients", "run.rounds=2")
    federation = build(other)
    initial = messages.arrays_record(encode(federation.start.state_dict(), "float32"))
    seen: list[int] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        assert set(arrays) == set(ours)
        seen.append(server_round)
        return None

    strategy = federation.strategy
    result = strategy.start(FaultyGrid(other, {}), initial, num_rounds=2, evaluate_fn=evaluate)
    arrays = decode(messages.record_arrays(result.arrays))
    assert set(arrays) == set(ours) and seen == [0, 1, 2]
    for name, tensor in ours.items():
        torch.testing.assert_close(arrays[name], tensor, rtol=0, atol=0)
    assert result.train_metrics_clientapp[2]["updates"] == 4
    assert 0.3 < float(result.evaluate_metrics_clientapp[2]["accuracy"]) <= 1  # type: ignore[arg-type]
