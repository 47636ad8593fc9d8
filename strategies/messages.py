"""Flower messages from the plain values that the rest of RankFit works with.

What clients send back is read in :mod:`rankfit.strategies.replies` alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from rankfit.adapters.adapter import Adapter
from rankfit.adapters.delta import ContentHashes, content_hashes, encode_delta
from rankfit.adapters.wire import encode, round_trip
from rankfit.configs.protocol import ADAPTER, DELTA, EVALUATE, PLAN, TRAIN, Instruction
from rankfit.configs.settings import RunSettings, derive
from rankfit.estimator.plan import Plan
from rankfit.strategies.diagnostics import Diagnosis
from rankfit.strategies.replies import Assignment
from rankfit.strategies.start import Share, Start


def arrays_record(arrays: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """Pack named arrays."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def record_arrays(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """Unpack named arrays."""
    return {name: array.numpy() for name, array in record.items()}


def message(
    content: RecordDict, node_id: int, message_type: str, server_round: int, ttl: float
) -> Message:
    """Address new content to one node; each message has a RecordDict of its own."""
    return Message(
        content, dst_node_id=node_id, message_type=message_type, ttl=ttl, group_id=str(server_round)
    )


def origin(message: Message) -> ConfigRecord:
    """Which round of which run a message is of: an update carries it back."""
    plan = message.content.config_records[PLAN]
    return ConfigRecord(Instruction.from_dict(plan).origin)


@dataclass(frozen=True)
class EncodedShare:
    """A share as it is sent, its hashes, and how far it is from the whole adapter."""

    share: Share
    record: ArrayRecord
    arrays: Mapping[str, NDArray[np.generic]]
    hashes: ContentHashes
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
    known : Mapping[int, ContentHashes]
        By node, hashes of what it was sent last.
    """

    def __init__(
        self,
        settings: RunSettings,
        start: Start,
        fingerprint: str,
        identity: str,
        number: int,
        known: Mapping[int, ContentHashes],
    ) -> None:
        self._settings = settings
        self._start = start
        self._fingerprint = fingerprint
        self._identity = identity
        self._number = number
        self._known = known
        self._encoded_shares: dict[object, EncodedShare] = {}

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
            encoded = self._encoded_share(sent, behind, client, plan, diagnosis)
            if diagnosis is not None:
                diagnosis.start(encoded.truncation)
            share = encoded.share
            instruction = self._instruction(share.given.scale, plan, client)
            record = ConfigRecord(replace(instruction, plan=plan.to_dict()).to_dict())
            adapter_record, extra, sent_bytes = self._without_known(encoded, node_id)
            content = RecordDict({ADAPTER: adapter_record, PLAN: record, **extra})
            outgoing.append(self._message(content, node_id, TRAIN))
            assignments.append(
                Assignment(
                    client, node_id, plan, share.given, sent_bytes, share.indices, encoded.hashes
                )
            )
        return assignments, outgoing

    def evaluation(self, adapter: Adapter, nodes: list[tuple[str, int, Plan]]) -> list[Message]:
        """One message for each (client, node id, plan): the whole adapter, on the plan's base."""
        arrays = encode(adapter.state_dict(), self._settings.wire.dtype)
        record = arrays_record(arrays)
        outgoing = []
        for client, node_id, plan in nodes:
            config = ConfigRecord(self._instruction(adapter.scale, plan, client).to_dict())
            content = RecordDict({ADAPTER: record, PLAN: config})
            outgoing.append(self._message(content, node_id, EVALUATE))
        return outgoing

    def _encoded_share(
        self,
        sent: Adapter,
        folded: Adapter | None,
        client: str,
        plan: Plan,
        diagnosis: Diagnosis | None,
    ) -> EncodedShare:
        same = (tuple(plan.ranks.items()), plan.remainder_rank)
        key = (same, client) if self._start.draws else same
        if key not in self._encoded_shares:
            seed = derive(self._settings.run.seed, "start", self._number, client)
            share = self._start.share(sent, folded, plan, seed)
            arrays = encode(share.travels.state_dict(), self._settings.wire.dtype)
            self._encoded_shares[key] = EncodedShare(
                share,
                arrays_record(arrays),
                arrays,
                content_hashes(arrays) if self._settings.wire.delta else {},
                diagnosis.truncation(share, self._start.folds) if diagnosis else 0.0,
            )
        return self._encoded_shares[key]

    def _without_known(
        self, encoded: EncodedShare, node_id: int
    ) -> tuple[ArrayRecord, dict[str, ConfigRecord], int]:
        """What is sent to a node, how it is completed there, and its bytes."""
        sent, record, extra = encoded.arrays, encoded.record, dict[str, ConfigRecord]()
        if self._settings.wire.delta:
            fewer, places = encode_delta(sent, encoded.hashes, self._known.get(node_id, {}))
            extra[DELTA] = ConfigRecord({**places})
            if places:
                sent, record = fewer, arrays_record(fewer)
        return record, extra, sum(array.nbytes for array in sent.values())

    def _arrives(self, adapter: Adapter) -> Adapter:
        """An adapter after the wire type's rounding."""
        state = round_trip(adapter.state_dict(), self._settings.wire.dtype)
        return Adapter.from_state_dict(state, adapter.scale)

    def _instruction(self, scale: float, plan: Plan, client: str) -> Instruction:
        return Instruction(
            self._number, self._identity, client, scale, self._fingerprint, plan.precision
        )

    def _message(self, content: RecordDict, node_id: int, kind: str) -> Message:
        ttl = self._settings.server.round_timeout_seconds
        return message(content, node_id, kind, self._number, ttl)
