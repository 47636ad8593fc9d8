"""Measured links: timed payloads through the real query of the client app."""

from collections.abc import Iterable

import pytest
from flwr.app import Message

from rankfit.configs.compose import compose
from rankfit.configs.settings import RunSettings
from rankfit.strategies import fleet as link
from rankfit.strategies.fleet import Fleet, measure_link
from tests.server.federation import Clock, FaultyGrid

KIB = 1024
CLOCK = Clock()


@pytest.fixture(autouse=True)
def only_the_links_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "time", CLOCK)


def settings_of(*overrides: str) -> RunSettings:
    none = ("fleet.memory-mib=16", 'fleet.upload-mbps=""', 'fleet.download-mbps=""')
    return compose(["quickstart", "simulation.clients=2", *none, *overrides])


class Slow(FaultyGrid):
    """Links of 8 Mbps to the clients and 4 from them, with a latency."""

    LATENCY = 0.05

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings, {})
        self.queries = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        sizes = [_size(self._waiting[i]) for i in message_ids if i in self._waiting]
        replies = list(super().pull_messages(message_ids))
        self.queries += len(replies)
        for sent, reply in zip(sizes, replies, strict=False):
            CLOCK.sleep(self.LATENCY + sent * 8e-6 / 8 + _size(reply) * 8e-6 / 4)
        return replies


def _size(message: Message) -> int:
    records = message.content.array_records.values()
    return sum(array.numpy().nbytes for record in records for array in record.values())


def test_both_directions_are_told_from_the_latency() -> None:
    grid = Slow(settings_of())
    found = measure_link(grid, 1000, 256 * KIB, 10.0)
    assert found is not None
    assert found.download_mbps == pytest.approx(8, rel=0.02)
    assert found.upload_mbps == pytest.approx(4, rel=0.02)
    assert found.latency == pytest.approx(Slow.LATENCY)


def test_a_fleet_measures_each_client_once_and_keeps_it_when_asked_again() -> None:
    grid = Slow(settings_of())
    fleet = Fleet(10.0, 128 * KIB)
    fleet.refresh(grid, 0)
    links = {name: device.report.upload_mbps for name, device in fleet.devices.items()}
    assert set(links) == {"partition-0", "partition-1"}
    assert all(mbps == pytest.approx(4, rel=0.02) for mbps in links.values())
    queries = grid.queries
    fleet.refresh(grid, 1)
    assert grid.queries == queries
    assert fleet._linked("partition-0", fleet.devices["partition-0"].report).upload_mbps > 0


def test_declared_figures_win() -> None:
    grid = Slow(settings_of("fleet.upload-mbps=20", "fleet.download-mbps=50"))
    fleet = Fleet(10.0, 128 * KIB)
    fleet.refresh(grid, 0)
    report = fleet.devices["partition-1"].report
    assert (report.upload_mbps, report.download_mbps) == (20, 50) and grid.queries == 2


def test_without_the_setting_nothing_is_measured() -> None:
    grid = Slow(settings_of())
    fleet = Fleet(10.0)
    fleet.refresh(grid, 0)
    assert grid.queries == 2 and fleet.devices["partition-0"].report.upload_mbps == 0


def test_a_client_that_does_not_answer_has_no_link() -> None:
    class Silent(FaultyGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return []

    assert measure_link(Silent(settings_of(), {}), 1000, KIB, 0.05) is None
