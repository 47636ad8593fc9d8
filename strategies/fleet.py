"""Who is there, what each device reports, how fast its link is, who takes part in a round."""

import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from rankfit.configs.protocol import FINISH, LINK, PAYLOAD, QUERY, LinkProbe
from rankfit.configs.settings import RunSettings, derive
from rankfit.estimator.device_report import DeviceReport
from rankfit.strategies import messages
from rankfit.strategies.replies import Refused, keeps_worker, partitions, read_failure, read_report

log = logging.getLogger(__name__)

#: Seconds between two looks for a reply: an error of as much.
LINK_PAUSE = 0.01
#: Plain queries whose fastest is the latency: starting a process is part of it.
PLAIN = 2
#: Seconds that a payload must add to the latency to tell a speed.
LEAST = 0.02


@dataclass(frozen=True)
class Link:
    """A measured link; 0 Mbps = too fast for the payload to tell, so no bound.

    Attributes
    ----------
    upload_mbps, download_mbps : float
        Megabits (10⁶) per second, from and to the client.
    latency : float
        Seconds of a query without a payload and its reply.
    """

    upload_mbps: float
    download_mbps: float
    latency: float


def measure_link(grid: Grid, node_id: int, nbytes: int, timeout: float) -> Link | None:
    """Time a payload to a client and one from it; None when a reply does not come in time.

    Parameters
    ----------
    nbytes : int
        Size of each payload.
    timeout : float
        Seconds for each of the queries.
    """
    plain = [_seconds(grid, node_id, RecordDict(), timeout) for _ in range(PLAIN)]
    known = [seconds for seconds in plain if seconds is not None]
    payload = np.frombuffer(os.urandom(nbytes), dtype=np.uint8)  # nothing on the way can shrink it
    down = RecordDict({PAYLOAD: messages.arrays_record({PAYLOAD: payload})})
    up = RecordDict({LINK: ConfigRecord(LinkProbe(nbytes).to_dict())})
    there, back = (_seconds(grid, node_id, content, timeout) for content in (down, up))
    if not known or there is None or back is None:
        log.warning("the link of node %d could not be measured in %.0f s", node_id, timeout)
        return None
    latency = min(known)
    return Link(_mbps(nbytes, back - latency), _mbps(nbytes, there - latency), latency)


def _mbps(nbytes: int, seconds: float) -> float:
    return nbytes * 8e-6 / seconds if seconds >= LEAST else 0.0


def _seconds(grid: Grid, node_id: int, content: RecordDict, timeout: float) -> float | None:
    """Time from sending a query to its reply; None for an error or no reply."""
    message = messages.message(content, node_id, QUERY, 0, timeout)
    began = time.monotonic()
    (identity,) = grid.push_messages([message])
    while time.monotonic() - began < timeout:
        for reply in grid.pull_messages([identity]):
            return None if reply.has_error() else time.monotonic() - began
        time.sleep(LINK_PAUSE)
    return None


#: The program as which a SuperLink starts a ServerApp; that of a simulation has another name.
_DEPLOYED = "flwr-serverapp"
#: Seconds between two looks for new nodes or replies.
PAUSE = 0.1
#: Clients that an error names with the reason why they cannot train.
_SHOWN = 5
#: Seconds that a known client has to report again; its last report counts after that.
RENEWAL = 30.0


class FleetError(RuntimeError):
    """Too few clients are there to start a round."""


@dataclass(frozen=True)
class Device:
    """A client and the node that it answers from at present."""

    node_id: int
    report: DeviceReport


def exchange(
    grid: Grid, outgoing: Iterable[Message], timeout: float
) -> Iterator[tuple[int, Message]]:
    """Send messages; yield (position, reply) as replies arrive, until all are there or time is up.

    A reply to no message that still waits is left out.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    outgoing : Iterable[Message]
        Positions count from 0 in this order.
    timeout : float
        Seconds; messages without a reply by then are left out.
    """
    deadline = time.monotonic() + timeout
    waiting = {text: index for index, text in enumerate(grid.push_messages(outgoing)) if text}
    pause = PAUSE
    while waiting:
        arrived = list(grid.pull_messages(list(waiting)))
        for reply in arrived:
            position = waiting.pop(reply.metadata.reply_to_message_id, None)
            if position is None:
                node = reply.metadata.src_node_id
                log.warning("a reply of node %d to no message that waits is left out", node)
                continue
            yield position, reply
        if not waiting or time.monotonic() > deadline:
            return
        if arrived:
            pause = PAUSE
        else:
            time.sleep(pause)
            pause = min(pause * 1.2, 1.0)


def in_order(replies: Iterable[tuple[int, Message]], limit: int) -> Iterator[tuple[int, Message]]:
    """Yield replies by position while at most ``limit`` have to wait for an earlier one.

    Rounding then does not depend on who answers first, and two runs of one seed agree to the last
    bit. Beyond the limit, which bounds the memory that a late client can cost, the first one that
    waits goes ahead.
    """
    waiting: dict[int, Message] = {}
    following = 0
    for position, reply in replies:
        waiting[position] = reply
        while waiting and (min(waiting) <= following or len(waiting) > limit):
            first = min(waiting)
            following = max(following, first + 1)
            yield first, waiting.pop(first)
    for position in sorted(waiting):
        yield position, waiting[position]


class Fleet:
    """The devices of a run by client name, asked when they are first seen and by :meth:`renew`.

    A node that joins late, or comes back under a new id, is new.

    Parameters
    ----------
    query_timeout : float
        Seconds for an answer.
    bind_names : bool
        A name belongs to the node that used it first: another one that claims it is refused.
    link_bytes : int
        Payload that measures the link of a client that declares none, one client after the other
        so that they do not share the server's (0 = links are not measured).
    """

    def __init__(
        self, query_timeout: float, link_bytes: int = 0, *, bind_names: bool = False
    ) -> None:
        self.devices: dict[str, Device] = {}
        #: Node that each name belongs to, for the whole run; empty where names are not bound.
        self.names: dict[str, int] = {}
        self._bind_names = bind_names
        self._query_timeout = query_timeout
        self._link_bytes = link_bytes
        #: Measured links, by client; None = it could not be measured.
        self._links: dict[str, Link | None] = {}
        self._asked: dict[int, str] = {}
        self._workers: set[int] = set()
        #: By node the number of nodes that share its data set (0 = it has files of its own).
        self._shares: dict[int, int] = {}
        self._gathered = False

    @classmethod
    def of(cls, settings: RunSettings) -> "Fleet":
        """The fleet of a run; names belong to nodes where a SuperLink with keys started it."""
        names, deployed = settings.server.bind_names, Path(sys.argv[0]).stem == _DEPLOYED
        return cls(
            settings.server.wait_seconds,
            int(settings.plan.measure_link_mib * 2**20),
            bind_names=names == "on" or (names == "auto" and deployed),
        )

    @property
    def partitions(self) -> int:
        """Parts of the data set that the nodes share, as most of them say; 0 = none is shared."""
        said = Counter(self._shares.values())
        return min(said, key=lambda count: (-said[count], count)) if said else 0

    def refresh(self, grid: Grid, server_round: int) -> None:
        """Ask every node that has not been asked before; forget clients whose node is gone."""
        present = set(grid.get_node_ids())
        for client in [c for c, device in self.devices.items() if device.node_id not in present]:
            log.warning("client %s is gone (node %d)", client, self.devices.pop(client).node_id)
        # A node that vanished and came back is asked again: its device may have changed.
        self._asked = {node: client for node, client in self._asked.items() if node in present}
        fresh = sorted(present - set(self._asked))
        if not fresh:
            return
        ttl = self._query_timeout
        outgoing = [
            messages.message(RecordDict(), node, QUERY, server_round, ttl) for node in fresh
        ]
        for index, reply in exchange(grid, outgoing, ttl):
            self._admit(fresh[index], reply)
        if self._link_bytes:
            self._measure_links(grid)
        for node in fresh:
            if node not in self._asked:
                log.warning("node %d has not answered the query in %.0f s", node, ttl)

    def finish(self, grid: Grid, seconds: float) -> None:
        """Tell the nodes that keep a worker that the run is over; wait until they have heard it.

        Only they are told, and only ``seconds`` long: a worker that is not reached ends by itself
        when it has been idle (``client.idle-seconds``).
        """
        nodes = sorted(self._workers & set(grid.get_node_ids()))
        outgoing = [messages.message(RecordDict(), node, FINISH, 0, seconds) for node in nodes]
        heard = 0
        for position, reply in exchange(grid, outgoing, seconds):
            heard += 1
            if reply.has_error():
                why = read_failure(reply).reason
                log.warning("node %d did not end its worker: %s", nodes[position], why)
        if heard < len(nodes):
            log.warning("%d nodes did not hear that the run is over", len(nodes) - heard)

    def _measure_links(self, grid: Grid) -> None:
        for client, device in self.devices.items():
            declared = device.report.upload_mbps > 0 and device.report.download_mbps > 0
            if not declared and client not in self._links:
                timeout = self._query_timeout
                link = measure_link(grid, device.node_id, self._link_bytes, timeout)
                self._links[client] = link
                self.devices[client] = replace(device, report=self._linked(client, device.report))
                if link is not None:
                    log.info(
                        "client %s: %.1f Mbps up, %.1f down, %.0f ms latency (0: too fast)",
                        client, link.upload_mbps, link.download_mbps, 1000 * link.latency,
                    )  # fmt: skip

    def _linked(self, client: str, report: DeviceReport) -> DeviceReport:
        """The report with the measured link where none is declared."""
        link = self._links.get(client)
        if link is None:
            return report
        return replace(
            report,
            upload_mbps=report.upload_mbps or link.upload_mbps,
            download_mbps=report.download_mbps or link.download_mbps,
        )

    def renew(self, grid: Grid, server_round: int, clients: Iterable[str]) -> bool:
        """Ask known clients again what they have now; say whether any report has changed.

        A simulated CPU device with a declared budget is not asked: its memory is fixed. A client
        that does not answer in time keeps its last report.
        """
        known = [c for c in clients if c in self.devices and _varies(self.devices[c].report)]
        outgoing = [
            messages.message(
                RecordDict(), self.devices[client].node_id, QUERY, server_round, RENEWAL
            )
            for client in known
        ]
        fresh: dict[str, DeviceReport] = {}
        for index, reply in exchange(grid, outgoing, min(RENEWAL, self._query_timeout)):
            report = _read(self.devices[known[index]].node_id, reply)
            if report is not None:
                named = replace(report, client=known[index])
                fresh[known[index]] = self._linked(known[index], named)
        for client in known:
            if client not in fresh:
                log.warning("client %s has not reported again; its last report counts", client)
        changed = {c: r for c, r in fresh.items() if r != self.devices[c].report}
        for client, report in changed.items():
            before = self.devices[client].report
            self.devices[client] = replace(self.devices[client], report=report)
            if report.budget_bytes != before.budget_bytes:
                log.info(
                    "client %s has %.1f MiB now, %.1f before",
                    client, report.budget_bytes / 2**20, before.budget_bytes / 2**20,
                )  # fmt: skip
        return bool(changed)

    def wait(
        self,
        grid: Grid,
        server_round: int,
        ready: Callable[[], int],
        refused: Callable[[], Mapping[str, str]],
        minimum: int,
        seconds: float,
    ) -> None:
        """Wait until ``ready()`` counts ``minimum`` clients; ``refused()`` says why others are not.

        With 0 one is enough, once all that are expected have answered or the time is up: as many
        as share the data set, or two where each has files of its own.

        Raises
        ------
        FleetError
            If they are not there in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.refresh(grid, server_round)
            count = ready()
            late = time.monotonic() > deadline
            self._gathered = self._gathered or late or len(self._asked) >= (self.partitions or 2)
            if count >= max(minimum, 1) and (minimum or self._gathered):
                return
            if late:
                reasons = [f"; {client}: {reason}" for client, reason in refused().items()]
                more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
                raise FleetError(
                    f"{count} clients could train within {seconds:.0f} s, and server.min-clients "
                    f"is {minimum or 'not set: one'} ({len(self.devices)} answered the query)"
                    + "".join(reasons[:_SHOWN]) + more
                )  # fmt: skip
            time.sleep(PAUSE)

    def _admit(self, node: int, reply: Message) -> None:
        self._asked[node] = ""
        report = _read(node, reply)
        if report is None:
            return
        if keeps_worker(reply):
            self._workers.add(node)
        if self._bind_names and self.names.setdefault(report.client, node) != node:
            log.warning(
                "node %d is refused: the name %r belongs to node %d in this run (set client-name, "
                "or server.bind-names=off where nodes have no keys)",
                node, report.client, self.names[report.client],
            )  # fmt: skip
            return
        self._shares[node] = partitions(reply)
        if report.client in self.devices:
            fresh = f"{report.client}-{node}"
            while fresh in self.devices:
                fresh += "-"
            log.warning(
                "two nodes call themselves %r; node %d becomes %r (set client-name)",
                report.client, node, fresh,
            )  # fmt: skip
            report = replace(report, client=fresh)
        self._asked[node] = report.client
        self.devices[report.client] = Device(node, self._linked(report.client, report))


def _read(node: int, reply: Message) -> DeviceReport | None:
    """The report in a reply; None, with a warning, where there is no usable one."""
    try:
        return read_report(reply)
    except Refused as refused:
        log.warning("node %d gave no device report that can be used: %s", node, refused)
        return None


def _varies(report: DeviceReport) -> bool:
    """Whether what a device has can differ from one query to the next (docs/devices.md)."""
    return report.accelerator != "cpu" or report.source != "declared"


def sample(clients: Mapping[str, object] | Iterable[str], count: int, seed: int) -> list[str]:
    """Draw ``count`` clients (or all, if there are fewer), the same for the same names and seed."""
    ordered = sorted(clients, key=natural)
    return sorted(random.Random(seed).sample(ordered, min(count, len(ordered))), key=natural)


def sample_by_weight(weights: Mapping[str, float], count: int, seed: int) -> list[str]:
    """Draw ``count`` different clients, each draw in proportion to the weights that are left.

    Raises
    ------
    ValueError
        If a weight is not above 0.
    """
    bad = {client: weight for client, weight in weights.items() if not weight > 0}
    if bad:
        raise ValueError(f"clients cannot be drawn by these weights: {bad}; expected above 0")
    left, drawn, generator = dict(weights), list[str](), random.Random(seed)
    while left and len(drawn) < count:
        ordered = sorted(left, key=natural)
        drawn += generator.choices(ordered, [left[client] for client in ordered])
        del left[drawn[-1]]
    return sorted(drawn, key=natural)


def round_seed(seed: int, server_round: int) -> int:
    """Seed of the sampling of one round."""
    return derive(seed, "sample", server_round)


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``partition-10`` after ``partition-9``."""
    parts = []
    for part in name.replace("-", " ").split():
        number = part.isascii() and part.isdigit()  # "²" is a digit to Python, and no number
        parts.append((0, int(part), "") if number else (1, 0, part))
    return tuple(parts)
