"""Who is there, what each device reports, and which clients take part in a round."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from rankfit.configs.seeds import derive
from rankfit.estimator.report import DeviceReport
from rankfit.strategies import messages
from rankfit.strategies.link import Link, measure_link

log = logging.getLogger(__name__)

#: Seconds between two looks for new nodes or replies.
PAUSE = 0.1
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
            yield waiting.pop(reply.metadata.reply_to_message_id), reply
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
    link_bytes : int
        Payload that measures the link of a client that declares none, one client after the other
        so that they do not share the server's (0 = links are not measured).
    """

    def __init__(self, query_timeout: float, link_bytes: int = 0) -> None:
        self.devices: dict[str, Device] = {}
        self._query_timeout = query_timeout
        self._link_bytes = link_bytes
        #: Measured links, by client; None = it could not be measured.
        self._links: dict[str, Link | None] = {}
        self._asked: dict[int, str] = {}
        self._workers: set[int] = set()

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
            messages.message(RecordDict(), node, messages.QUERY, server_round, ttl)
            for node in fresh
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
        outgoing = [
            messages.message(RecordDict(), node, messages.FINISH, 0, seconds) for node in nodes
        ]
        heard = 0
        for position, reply in exchange(grid, outgoing, seconds):
            heard += 1
            if reply.has_error():
                why = messages.failure(reply)
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
                RecordDict(), self.devices[client].node_id, messages.QUERY, server_round, RENEWAL
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
        minimum: int,
        seconds: float,
    ) -> None:
        """Wait until ``ready()`` counts ``minimum`` clients.

        Raises
        ------
        FleetError
            If they are not there in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.refresh(grid, server_round)
            count = ready()
            if count >= minimum:
                return
            if time.monotonic() > deadline:
                raise FleetError(
                    f"{count} of the {minimum} clients that server.min-clients asks for were ready "
                    f"within {seconds:.0f} s ({len(self.devices)} answered the query)"
                )
            time.sleep(PAUSE)

    def _admit(self, node: int, reply: Message) -> None:
        self._asked[node] = ""
        report = _read(node, reply)
        if report is None:
            return
        if messages.keeps_worker(reply):
            self._workers.add(node)
        known = self.devices.get(report.client)
        if known is not None:
            log.warning(
                "two nodes call themselves %r; node %d becomes %r (set client-name)",
                report.client, node, f"{report.client}-{node}",
            )  # fmt: skip
            report = replace(report, client=f"{report.client}-{node}")
        self._asked[node] = report.client
        self.devices[report.client] = Device(node, self._linked(report.client, report))


def _read(node: int, reply: Message) -> DeviceReport | None:
    """The report in a reply; None, with a warning, where there is no usable one."""
    if reply.has_error():
        log.warning("node %d gave no device report: %s", node, messages.failure(reply))
        return None
    try:
        return messages.device_report(reply)
    except ValueError as error:
        log.warning("node %d gave a device report that cannot be used: %s", node, error)
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
        parts.append((0, int(part), "") if part.isdigit() else (1, 0, part))
    return tuple(parts)
