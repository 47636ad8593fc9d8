"""``wire.delta``: the same run with fewer bytes, also when a node forgets what it was sent."""

from pathlib import Path

import pytest
from flwr.app import Message

from rankfit.server.loop import federate
from tests.server.federation import FaultyGrid, run, settings_for
from tests.server.test_loop import lines

UNLIMITED = ("plan.upload-seconds=0", "plan.download-seconds=0")


def download(line: dict[str, object]) -> dict[str, int]:
    return {name: own["download-bytes"] for name, own in line["clients"].items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["ffa-lora", "flora", "rankfit"])
def test_a_run_is_the_same_with_fewer_bytes(method: str, tmp_path: Path) -> None:
    parts = (f"method.name={method}", "head.mode=frozen", *UNLIMITED)
    run(settings_for(tmp_path, "whole", *parts))
    run(settings_for(tmp_path, "fewer", *parts, "wire.delta=true"))
    whole, fewer = lines(tmp_path / "whole"), lines(tmp_path / "fewer")
    for one, other in zip(whole, fewer, strict=True):
        assert one["evaluation"] == other["evaluation"]
    assert download(whole[1]) == download(fewer[1])
    for name, nbytes in download(whole[3]).items():
        shares = {"ffa-lora": 0.6, "flora": 0.8}
        assert download(fewer[3])[name] <= shares.get(method, 1.0) * nbytes


def test_a_node_that_forgot_gets_everything_again(tmp_path: Path) -> None:
    parts = ("method.name=ffa-lora", "wire.delta=true", *UNLIMITED)
    settings = settings_for(tmp_path, "forgets", *parts)

    def forget(message: Message, reply: Message) -> Message:
        if message.metadata.group_id == "1":
            del grid.state_of(2)["received"]
        return reply

    grid = FaultyGrid(settings, {2: forget})
    federate(grid, settings)
    rounds = lines(tmp_path / "forgets")
    merged = [line["clients"]["partition-2"]["merged"] for line in rounds[1:]]
    assert merged == [True, False, True]
    assert "lost its state" in rounds[2]["clients"]["partition-2"]["reason"]
    everything = download(rounds[1])["partition-2"]
    assert download(rounds[2])["partition-2"] < everything == download(rounds[3])["partition-2"]
