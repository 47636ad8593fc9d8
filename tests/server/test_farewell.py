"""At the end of a run, however it ends, the nodes that keep a worker are told that it is over."""

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from rankfit.client.app import app as client_app
from rankfit.configs import protocol
from rankfit.configs.faults import Fault
from rankfit.configs.settings import RunSettings, to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import federate
from rankfit.strategies import fleet
from rankfit.strategies.fleet import FleetError
from tests.server.federation import Clock, settings_for

WORKERS = (0, 2)


class Fleet(InProcessGrid):
    """Four nodes, two of which say that they keep a worker; notes who is told of the end."""

    def __init__(self, settings: RunSettings, answers: bool = True) -> None:
        self.told: list[int] = []

        def handle(message: Message, context: Context) -> Message:
            position = int(context.node_config["partition-id"])
            if message.metadata.message_type == protocol.FINISH:
                self.told.append(position)
                if not answers:
                    return Message(
                        Error(2, Fault("worker-start", text="it does not end").written()),
                        reply_to=message,
                    )
                return Message(RecordDict(), reply_to=message)
            reply = client_app(message, context)
            if message.metadata.message_type == protocol.QUERY:
                reply.content["client"] = ConfigRecord({"worker": position in WORKERS})
            return reply

        nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
        super().__init__(handle, to_flat(settings), nodes)


def test_nodes_with_a_worker_are_told_when_the_run_is_over(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "over", "run.rounds=1", "server.clients-per-round=1")
    grid = Fleet(settings)
    federate(grid, settings)
    assert sorted(grid.told) == list(WORKERS)


def test_they_are_told_of_a_run_that_fails_and_its_error_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "time", Clock())
    few = ("server.min-clients=4", "server.wait-seconds=0.1", "plan.min-rank=8")
    settings = settings_for(tmp_path, "failed", *few)
    grid = Fleet(settings, answers=False)
    with pytest.raises(FleetError):
        federate(grid, settings)
    assert sorted(grid.told) == list(WORKERS)
    assert "did not end its worker" in caplog.text and "it does not end" in caplog.text
