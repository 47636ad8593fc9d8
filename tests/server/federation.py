"""A small federation of real apps over the in-process grid, with faults to order."""

from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from rankfit.client.app import app as client_app
from rankfit.configs.compose import compose
from rankfit.configs.settings import RunSettings, to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import federate

#: Changes a reply of a client, or raises, or returns None for a client that never answers.
Fault = Callable[[Message, Message], Message | None]


class Clock:
    """Stands for the module ``time`` where only waiting is to take time, however slow the machine.

    Nodes in this process answer when they are asked: a deadline that real time could pass would
    measure the machine.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


_SMALL = (
    "run.rounds=3",
    "simulation.clients=4",
    "server.clients-per-round=4",
    "server.min-clients=4",
    "partition.kind=iid",
    'fleet.memory-mib="4,5.98,16"',
)


class FaultyGrid(InProcessGrid):
    """An in-process grid in which the replies of some partitions pass through a fault."""

    def __init__(self, settings: RunSettings, faults: dict[int, Fault]) -> None:
        count = settings.simulation.clients
        nodes = [{"partition-id": i, "num-partitions": count} for i in range(count)]
        self._faults = faults

        def handle(message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            fault = self._faults.get(int(context.node_config["partition-id"]))
            if fault is None or message.metadata.message_type != "train":
                return reply
            changed = fault(message, reply)
            if changed is None:
                raise _Silence
            return changed

        super().__init__(handle, to_flat(settings), nodes)

    def state_of(self, partition: int) -> RecordDict:
        """What Flower keeps for a node between messages."""
        return self._contexts[1000 + partition].state

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the first waiting message whose client answers at all."""
        for message_id in message_ids:
            if message_id in self._waiting:
                try:
                    return [self._handle(self._waiting.pop(message_id))]
                except _Silence:
                    continue
        return []


class _Silence(BaseException):
    """A client that never answers."""


def settings_for(folder: Path, name: str, *overrides: str) -> RunSettings:
    """Quickstart settings cut down to a few seconds."""
    place = (f"run.directory={folder}", f"run.name={name}")
    return compose(["quickstart", *_SMALL, *place, *overrides])


def run(settings: RunSettings, faults: dict[int, Fault] | None = None) -> Path:
    """Run a federation in this process; return its run directory."""
    federate(FaultyGrid(settings, faults or {}), settings)
    return Path(settings.run.directory) / settings.run.name
