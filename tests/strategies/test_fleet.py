"""The order in which replies are folded, and whose a client's name is."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from rankfit.configs.settings import from_flat
from rankfit.estimator.device_report import DeviceReport
from rankfit.server.in_process import InProcessGrid
from rankfit.strategies.fleet import Fleet, in_order


def order(arrived: Sequence[int], limit: int) -> list[int]:
    replies: Any = [(position, None) for position in arrived]
    return [position for position, _ in in_order(replies, limit)]


@pytest.mark.parametrize("arrived", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_replies_are_folded_in_the_order_of_their_messages(arrived: list[int]) -> None:
    assert order(arrived, 4) == [0, 1, 2, 3]


def test_a_client_that_never_answers_is_left_out() -> None:
    assert order([3, 1, 2], 4) == [1, 2, 3]


def test_no_more_than_the_limit_wait_for_a_late_client() -> None:
    assert order([5, 4, 3, 2, 1, 0], 2) == [3, 4, 5, 2, 1, 0]
    waiting: list[int] = []

    def arriving() -> Any:
        for position in [9, 8, 7, 6, 5, 0, 4, 1, 2, 3]:
            waiting.append(position)
            yield position, None

    for position, _ in in_order(arriving(), 3):
        assert len(waiting) <= 4
        waiting.remove(position)
    assert waiting == []


class Nodes(InProcessGrid):
    """Nodes that give the name in their config, and are there when they are said to be."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(_report, {}, [{"client-name": name} for name in names])
        self.present: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        return [1000 + position for position in self.present]


def _report(message: Message, context: Context) -> Message:
    name = str(context.node_config["client-name"])
    report = DeviceReport(name, "cpu", "cpu", "", "", 2**30, 2**30, 0, -1, "ram", "")
    return Message(RecordDict({"device": ConfigRecord({**report.to_dict()})}), reply_to=message)


def test_a_name_belongs_to_the_node_that_used_it_first(caplog: pytest.LogCaptureFixture) -> None:
    honest, impostor = 0, 1
    grid, fleet = Nodes(["berlin", "berlin", "oslo"]), Fleet(10.0, bind_names=True)
    grid.present = [honest, 2]
    fleet.refresh(grid, 1)
    assert {name: device.node_id for name, device in fleet.devices.items()} == {
        "berlin": 1000, "oslo": 1002,
    }  # fmt: skip
    grid.present = [impostor, 2]  # it comes while the honest one is away
    fleet.refresh(grid, 2)
    assert set(fleet.devices) == {"oslo"} and "node 1001 is refused" in caplog.text
    grid.present = [honest, impostor, 2]
    fleet.refresh(grid, 3)
    assert fleet.devices["berlin"].node_id == 1000 and len(fleet.devices) == 2
    # Another process of the same run remembers.
    again = Fleet(10.0, bind_names=True)
    again.names |= fleet.names
    grid.present = [impostor]
    again.refresh(grid, 4)
    assert not again.devices


def test_names_are_bound_where_a_superlink_started_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = Nodes(["berlin", "berlin"])
    grid.present = [0, 1]
    for program, setting, count in (
        ("flwr-serverapp", "auto", 1), ("flwr-simulation", "auto", 2),
        ("flwr-serverapp", "off", 2), ("pytest", "on", 1),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", [f"/bin/{program}"])
        fleet = Fleet.of(from_flat({"server.bind-names": setting}))
        fleet.refresh(grid, 1)
        assert len(fleet.devices) == count, (program, setting)
