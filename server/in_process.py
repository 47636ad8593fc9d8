"""A Flower Grid whose nodes are this process: the real ServerApp and ClientApp without transport.

Messages are the same Flower objects that travel on a network; only the SuperLink is missing. One
message is handled at each look for replies, in order, so that a run is deterministic and a round
that is cut short by its deadline is cut like on a network.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from rankfit.configs.faults import fault_of
from rankfit.configs.settings import OWNER, Scalar

#: Handles one message on one node; Flower's ClientApp is one.
Handler = Callable[[Message, Context], Message]

_CLIENT_RAISED = 2


class InProcessGrid(Grid):
    """Nodes that are served one after the other by a ClientApp in this process.

    Parameters
    ----------
    client_app : Handler
        Flower's ClientApp, or any function of its form.
    run_config : dict[str, Scalar]
        What the nodes see as run config.
    node_configs : Sequence[dict[str, Scalar]]
        One node each; ids count from 1000. Whoever runs this process owns their data, unless one
        names a ``policy``.
    """

    def __init__(
        self,
        client_app: Handler,
        run_config: dict[str, Scalar],
        node_configs: Sequence[dict[str, Scalar]],
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._client_app = client_app
        self._contexts = {
            1000 + index: Context(
                run_id=1,
                node_id=1000 + index,
                node_config={"policy": OWNER, **config},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index, config in enumerate(node_configs)
        }
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Not needed: there is one run."""

    @property
    def run(self) -> Run:
        """Not available: there is no SuperLink."""
        raise RuntimeError("an in-process grid belongs to no run of a SuperLink")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See the base class."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are asked for."""
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id  # as the SuperLink does
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the first waiting message among ``message_ids``, and return its reply."""
        for message_id in message_ids:
            if message_id in self._waiting:
                return [self._handle(self._waiting.pop(message_id))]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Handle all messages at once."""
        return [self._handle(self._waiting.pop(i)) for i in self.push_messages(messages)]

    def _handle(self, message: Message) -> Message:
        """Run the app; an exception becomes an error reply, as Flower's own backends do."""
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # noqa: BLE001 - whatever an app raises
            return Message(Error(_CLIENT_RAISED, fault_of(error).written()), reply_to=message)
