"""Messages to the clients of one round: each share is encoded once for all who get the same."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from rankfit.adapters.held import Prints, leave_out, prints
from rankfit.adapters.state import Adapter
from rankfit.adapters.wire import encode, round_trip
from rankfit.configs.seeds import derive
from rankfit.configs.settings import RunSettings
from rankfit.estimator.plan import Plan
from rankfit.strategies import messages
from rankfit.strategies.diagnosis import Diagnosis
from rankfit.strategies.replies import Assignment
from rankfit.strategies.start import Share, Start


@dataclass(frozen=True)
class Parcel:
    """A share as it is sent, its hashes, and how far it is from the whole adapter."""

    share: Share
    record: ArrayRecord
    arrays: Mapping[str, NDArray[np.generic]]
    prints: Prints
    truncation: float


class Dispatch:
    """Addresses the messages of one round.

    Parameters
    ----------
    settings : RunSettings
        The run.
    start : Start
        What each client is given.
    fingerprint, identity : str
        Of the base model, a client with another base refuses; and of the run.
    number : int
        The round.
    held : Mapping[int, Prints]
        By node, hashes of what it was sent last.
    """

    def __init__(
        self,
        settings: RunSettings,
        start: Start,
        fingerprint: str,
        identity: str,
        number: int,
        held: Mapping[int, Prints],
    ) -> None:
        self._settings = settings
        self._start = start
        self._fingerprint = fingerprint
        self._identity = identity
        self._number = number
        self._held = held
        self._parcels: dict[object, Parcel] = {}

    def training(
        self,
        adapter: Adapter,
        folded: Adapter | None,
        clients: list[tuple[str, int, Plan]],
        diagnosis: Diagnosis | None,
    ) -> tuple[list[Assignment], list[Message]]:
        """One message for each (client, node id, plan), and what it asks for, in this order."""
        sent = self._arrives(adapter)
        behind = folded and self._arrives(folded)
        assignments, outgoing = [], []
        for client, node_id, plan in clients:
            parcel = self._parcel(sent, behind, client, plan, diagnosis)
            if diagnosis is not None:
                diagnosis.start(parcel.truncation)
            share = parcel.share
            config = self._config(share.given.scale) | {"client": client}
            record = ConfigRecord({**config, **plan.to_dict()})
            adapter_record, extra, sent_bytes = self._without_held(parcel, node_id)
            content = RecordDict({"adapter": adapter_record, "plan": record, **extra})
            outgoing.append(self._message(content, node_id, messages.TRAIN))
            assignments.append(
                Assignment(
                    client, node_id, plan, share.given, sent_bytes, share.indices, parcel.prints
                )
            )
        return assignments, outgoing

    def evaluation(self, adapter: Adapter, nodes: list[tuple[int, Plan]]) -> list[Message]:
        """One message for each (node id, plan), with the whole adapter, on the plan's base."""
        arrays = encode(adapter.state_dict(), self._settings.wire.dtype)
        record = messages.arrays_record(arrays)
        outgoing = []
        for node_id, plan in nodes:
            config = ConfigRecord({**self._config(adapter.scale), "precision": plan.precision})
            content = RecordDict({"adapter": record, "plan": config})
            outgoing.append(self._message(content, node_id, messages.EVALUATE))
        return outgoing

    def _parcel(
        self,
        sent: Adapter,
        folded: Adapter | None,
        client: str,
        plan: Plan,
        diagnosis: Diagnosis | None,
    ) -> Parcel:
        same = (tuple(plan.ranks.items()), plan.tail_rank)
        key = (same, client) if self._start.draws else same
        if key not in self._parcels:
            seed = derive(self._settings.run.seed, "start", self._number, client)
            share = self._start.share(sent, folded, plan, seed)
            arrays = encode(share.travels.state_dict(), self._settings.wire.dtype)
            self._parcels[key] = Parcel(
                share,
                messages.arrays_record(arrays),
                arrays,
                prints(arrays) if self._settings.wire.skip_held else {},
                diagnosis.truncation(share, self._start.folds) if diagnosis else 0.0,
            )
        return self._parcels[key]

    def _without_held(
        self, parcel: Parcel, node_id: int
    ) -> tuple[ArrayRecord, dict[str, ConfigRecord], int]:
        """What is sent to a node, how it is completed there, and its bytes."""
        sent, record, extra = parcel.arrays, parcel.record, dict[str, ConfigRecord]()
        if self._settings.wire.skip_held:
            fewer, places = leave_out(sent, parcel.prints, self._held.get(node_id, {}))
            extra["held"] = ConfigRecord({**places})
            if places:
                sent, record = fewer, messages.arrays_record(fewer)
        return record, extra, sum(array.nbytes for array in sent.values())

    def _arrives(self, adapter: Adapter) -> Adapter:
        """An adapter after the wire type's rounding."""
        state = round_trip(adapter.state_dict(), self._settings.wire.dtype)
        return Adapter.from_state_dict(state, adapter.scale)

    def _config(self, scale: float) -> dict[str, int | float | str]:
        return {
            "round": self._number, "scale": scale, "fingerprint": self._fingerprint,
            "run": self._identity,
        }  # fmt: skip

    def _message(self, content: RecordDict, node_id: int, kind: str) -> Message:
        ttl = self._settings.server.round_timeout_seconds
        return messages.message(content, node_id, kind, self._number, ttl)
