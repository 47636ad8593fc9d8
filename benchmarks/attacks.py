"""Hostile clients against a round: what each kind of reply does to the others' run.

A real round is trained once; then one client's reply is replaced by each of the attacks in turn,
and the round is folded and closed again. No attack may end the run, and none may change the merged
adapter other than a capped update of that client could. ``--mutations`` changes bytes and figures
at random besides, and watches time and memory.

    python -m benchmarks.attacks                 # tables, docs/security.md and attacks.json
    python -m benchmarks.attacks --mutations 0   # the attacks alone
"""

import argparse
import copy
import io
import itertools
import json
import logging
import math
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from benchmarks.machine import machine, write_record, write_table
from rankfit.adapters.adapter import Adapter
from rankfit.adapters.robust import length
from rankfit.adapters.wire import WireError, read_npy
from rankfit.client.app import app as client_app
from rankfit.configs import protocol
from rankfit.configs.compose import compose
from rankfit.configs.faults import Fault
from rankfit.configs.settings import to_flat
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import build
from rankfit.strategies import replies
from rankfit.strategies.fleet import exchange
from rankfit.strategies.training_round import Outcome

RESULT = Path(__file__).parent / "results" / "attacks.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
#: Position of the hostile client in its round.
HOSTILE = 2
#: A reply that a client sent → what it sends in its place (None = nothing at all).
Attack = Callable[[Message], Message | None]

#: Numbers that no client can have measured, or that break what computes with them.
BAD_NUMBERS: tuple[Any, ...] = (
    -1, 0, 10**9, 10**18, 10**30, -(10**18), 0.5, -0.0, 5e-324, 1e20, 1e300, -1e300,
    math.nan, math.inf, -math.inf, [], [1, 2], [math.nan],
)  # fmt: skip
#: Texts that break terminals, tables, logs, pages or files.
BAD_TEXTS = (
    "", " ", "[/bold]", "[red]x", "\x1b[2J\x1b[31m", "a\nround 9/9, accuracy 1.0", "node-²",
    "\u202eabc", "<script>x</script>", "../../etc", "x" * 10**6, "\x00", "9" * 5000, "\ud800",
)  # fmt: skip
#: What the server itself adds to a client's metrics, and what it writes beside them.
OWN_FIGURES = ("expected-peak-bytes", "kept-free-bytes", "shortened")
OWN_FIELDS = (
    "merged", "rank", "reason", "kind", "parameters", "upload-bytes", "download-bytes",
    *OWN_FIGURES,
)  # fmt: skip


class Arena:
    """A round of four real clients of mixed ranks, trained once and folded as often as wanted."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        small = (
            "quickstart", "run.rounds=3", "simulation.clients=4", "server.clients-per-round=4",
            "server.min-clients=4", "partition.kind=iid", "plan.read-memory=once",
            f"run.directory={folder}", "run.name=arena", *overrides,
        )  # fmt: skip
        self.settings = compose(small)
        federation = build(self.settings)
        self.strategy, self.start = federation.strategy, federation.start
        nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
        self.grid = InProcessGrid(client_app, to_flat(self.settings), nodes)
        self.strategy.prepare(self.grid, 0)
        outgoing = self.strategy.open_round(1, self.start, self.grid)
        self.honest = [reply for _, reply in exchange(self.grid, outgoing, 600.0)]
        self.report = self._ask()
        self.without = self.play(lambda reply: None)[0]
        self.allowed = self._allowed()

    def _ask(self) -> Message:
        from rankfit.strategies import messages

        content = messages.message(RecordDict(), 1000, protocol.QUERY, 0, 60.0)
        return next(iter(exchange(self.grid, [content], 60.0)))[1]

    def play(self, attack: Attack) -> tuple[Adapter, list[Outcome]]:
        """Open, fold and close the round with one client's reply attacked."""
        self.strategy.planner.restore({})
        self.strategy.restore(self.strategy.state() | {"samples": {}}, {}, 1)
        self.strategy.open_round(1, self.start, self.grid)
        for position, reply in enumerate(self.honest):
            sent: Message | None = reply
            if position == HOSTILE:
                sent = attack(clone(reply))
            if sent is not None:
                self.strategy.receive(position, sent)
        return self.strategy.close_round()

    def _allowed(self) -> float:
        """How far one client may move the adapter: at the weight and the length of the limits.

        With a share w of the weight, a change c moves the mean m of the others' changes by
        w · (c − m), so by w · (‖c‖ + ‖m‖) at most.
        """
        server, lengths = self.settings.server, []

        def measured(judge: Callable[..., Any]) -> Callable[..., Any]:
            def judged(clients: Any, updates: Any, *rest: Any) -> Any:
                lengths.extend(length(own.given, own.trained) for own in updates)
                return judge(clients, updates, *rest)

            return judged

        judge = self.strategy.screening.judge
        self.strategy.screening.judge = measured(judge)  # type: ignore[method-assign]
        self.play(lambda reply: reply)
        self.strategy.screening.judge = judge  # type: ignore[method-assign]
        share = max(server.max_weight_share, 2 / len(self.honest))
        whole = length(self.start, self.without)
        return max(
            share * (1 + server.norm_limit * max(own) / others)
            for own, others in (
                ([own.factors for own in lengths], whole.factors),
                ([own.head for own in lengths], whole.head),
            )
        )

    def moved(self, adapter: Adapter) -> float:
        """How far an adapter is from what the others alone would have merged, relative to that."""
        own, whole = length(self.without, adapter), length(self.start, self.without)
        return max(own.factors / whole.factors, own.head / whole.head)


def clone(reply: Message) -> Message:
    """A reply that can be changed: arrays share their bytes."""
    fresh = copy.copy(reply)
    fresh.__dict__ = dict(reply.__dict__)
    content = RecordDict()
    for name, record in reply.content.items():
        content[name] = type(record)(dict(record))
    fresh.__dict__["_content"] = content
    return fresh


def with_metric(name: str, value: Any) -> Attack:
    """Set one figure; None removes it."""

    def attack(reply: Message) -> Message:
        metrics = dict(reply.content["metrics"])
        metrics.pop(name, None)
        if value is not None:
            metrics[name] = value
        reply.content["metrics"] = MetricRecord(metrics)
        return reply

    return attack


def with_array(part: str, change: Callable[[Array], Array | None]) -> Attack:
    """Change the first array whose name has a part; None removes it."""

    def attack(reply: Message) -> Message:
        arrays = dict(reply.content["adapter"])
        name = next(name for name in sorted(arrays) if part in name)
        changed = change(arrays.pop(name))
        if changed is not None:
            arrays[name] = changed
        reply.content["adapter"] = ArrayRecord(arrays)
        return reply

    return attack


def with_all(change: Callable[[Any], Any]) -> Attack:
    """Change the numbers of all arrays."""

    def attack(reply: Message) -> Message:
        arrays = {
            n: Array(np.asarray(change(a.numpy()))) for n, a in reply.content["adapter"].items()
        }
        reply.content["adapter"] = ArrayRecord(arrays)
        return reply

    return attack


def with_record(name: str, record: Any) -> Attack:
    """Replace or remove a whole record."""

    def attack(reply: Message) -> Message:
        reply.content.pop(name, None)
        if record is not None:
            reply.content[name] = record
        return reply

    return attack


def with_name(name: str, numbers: int = 1) -> Attack:
    """Add an array of a name that was not asked for."""

    def attack(reply: Message) -> Message:
        arrays = dict(reply.content["adapter"])
        arrays[name] = Array(np.zeros(numbers, np.float32))
        reply.content["adapter"] = ArrayRecord(arrays)
        return reply

    return attack


def failing(reason: str, code: int = 2) -> Attack:
    """An error in the place of an answer."""

    def attack(reply: Message) -> Message:
        fresh = clone(reply)
        fresh.__dict__["_content"], fresh.__dict__["_error"] = None, Error(code, reason)
        return fresh

    return attack


def raw(data: bytes) -> Callable[[Array], Array]:
    """The same array with other bytes."""
    return lambda array: Array(array.dtype, array.shape, array.stype, data)


def bytes_of(array: Array, change: Callable[[bytes], bytes]) -> Array:
    """The same array with its bytes changed."""
    return Array(array.dtype, array.shape, array.stype, change(array.data))


def _numbers(change: Callable[[Any], Any]) -> Callable[[Array], Array]:
    return lambda array: Array(np.asarray(change(array.numpy().copy())))


def _filled(value: float) -> Callable[[Any], Any]:
    return lambda numbers: np.full_like(numbers, value)


def _claims(text: str) -> bytes:
    """A .npy header that claims something, with no numbers behind it."""
    header = text.encode() + b" " * 20 + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


_HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': ("


def _one(value: float) -> Callable[[Any], Any]:
    """One number among the others."""

    def change(numbers: Any) -> Any:
        numbers.reshape(-1)[0] = value
        return numbers

    return change


def _object_array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return out.getvalue()


ARRAY_ATTACKS: Mapping[str, Callable[[Array], Array | None]] = {
    "removed": lambda array: None,
    "no bytes": raw(b""),
    "cut off": lambda array: bytes_of(array, lambda data: data[:-3]),
    "header alone": lambda array: bytes_of(array, lambda data: data[:128]),
    "half a header": lambda array: bytes_of(array, lambda data: data[:40]),
    "one byte more": lambda array: bytes_of(array, lambda data: data + b"\0"),
    "random bytes": raw(random.Random(0).randbytes(4096)),
    "a zip archive": raw(b"PK\x03\x04" + bytes(200)),
    "a pickle": raw(b"\x80\x04\x95" + bytes(200)),
    "an object array": raw(_object_array()),
    "claims a terabyte": raw(_claims(_HEADER + "1099511627776,), }")),
    "a header of code": raw(_claims("__import__('os').getcwd()")),
    "a header of brackets": raw(_claims("(" * 9000)),
    "digits without end": raw(_claims(_HEADER + "1" * 6000)),
    "float64": _numbers(lambda n: n.astype("float64")),
    "whole numbers": _numbers(lambda n: n.astype("int32")),
    "big-endian": _numbers(lambda n: n.astype(">f4")),
    "complex": _numbers(lambda n: n.astype("complex64")),
    "transposed": _numbers(lambda n: n.T.copy() if n.ndim > 1 else n[:-1]),
    "one row less": _numbers(lambda n: n[1:]),
    "one axis more": _numbers(lambda n: n[None]),
    "a single number": _numbers(lambda n: n.reshape(-1)[0]),
    "no rows": _numbers(lambda n: n[:0]),
    "one NaN": _numbers(_one(math.nan)),
    "all NaN": _numbers(_filled(math.nan)),
    "one inf": _numbers(_one(math.inf)),
    "1e20": _numbers(_filled(1e20)),
    "3e38": _numbers(_filled(3e38)),
    "one 1e30": _numbers(_one(1e30)),
    "1e5": _numbers(_filled(1e5)),
    "subnormal": _numbers(_filled(1e-44)),
    "other serialisation": lambda array: Array(array.dtype, array.shape, "pickle", array.data),
    "200 MB": lambda array: Array(np.zeros(50_000_000, np.float32)),
}  # fmt: skip


def training_attacks() -> Iterator[tuple[str, str, Attack]]:
    """Group, name and attack of every hostile training reply."""
    for name in replies.TRAINING:
        for value in BAD_NUMBERS:
            yield "figures", f"{name} = {value}", with_metric(name, value)
    yield "figures", "no num-examples", with_metric("num-examples", None)
    for name in OWN_FIELDS:
        yield "server's fields", name, with_metric(name, 7)
    for text in BAD_TEXTS:
        yield "names", f"figure {text[:12]!r}", with_metric(text, 1.0)
        yield "names", f"array {text[:12]!r}", with_name(text)
        yield "names", f"error {text[:12]!r}", failing(text)
    yield "names", "score of a module that is not there", with_metric("score.evil", 1e30)
    yield "names", "a name of 10 MB", with_name("y" * 10**7)
    yield "names", "a foreign array of 200 MB", with_name("base_model.model.evil", 50_000_000)
    for part in ("lora_A", "lora_B", "classifier.weight", "classifier.bias"):
        for name, change in ARRAY_ATTACKS.items():
            yield "arrays", f"{part}: {name}", with_array(part, change)
    for factor in (-1, 10, -10, 100, 1e3, -1e3, 1e6, 1e30, 0):
        yield "numbers", f"all × {factor:g}", with_all(lambda n, f=factor: (n * f).astype(n.dtype))
    for spread in (0.01, 1.0, 100.0):
        noise = np.random.default_rng(0)
        yield (
            "numbers",
            f"noise of {spread:g}",
            with_all(lambda n, s=spread, d=noise: (n + d.normal(0, s, n.shape)).astype(n.dtype)),
        )
    for name in (protocol.ADAPTER, protocol.METRICS, protocol.ORIGIN):
        for kind, record in (
            ("missing", None),
            ("empty arrays", ArrayRecord({})),
            ("empty metrics", MetricRecord({})),
            ("empty config", ConfigRecord({})),
            ("of text", ConfigRecord({"round": "x", "run": b"y"})),
        ):
            yield "records", f"{name}: {kind}", with_record(name, record)
    for number in (0, 2, -1, 10**30):
        origin = ConfigRecord({"round": number, "run": "another"})
        yield "replays", f"of round {number}, another run", with_record(protocol.ORIGIN, origin)
    yield (
        "replays",
        "of another run",
        with_record(protocol.ORIGIN, ConfigRecord({"round": 1, "run": ""})),
    )
    yield "replays", "silence", lambda reply: None


def report_attacks() -> Iterator[tuple[str, str, Any]]:
    """Group, name and (field, value) of every hostile device report."""
    numbers = ("total-bytes", "free-bytes", "reserved-bytes", "processes", "upload-mbps",
               "download-mbps", "samples", "group-size")  # fmt: skip
    for field in numbers:
        for value in (*BAD_NUMBERS, "12", b"12", True, None):
            yield "report figures", f"{field} = {value}", (field, value)
    for field in ("client", "name", "uuid", "compute-capability", "note", "accelerator", "source"):
        for value in (*BAD_TEXTS, 7, b"x", None):
            yield "report texts", f"{field} = {str(value)[:12]!r}", (field, value)


def evaluation_attacks() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Group, name and figures of every hostile evaluation."""
    honest = {"num-examples": 100, "accuracy": 0.5, "macro-f1": 0.5, "micro-f1": 0.5, "loss": 1.0}
    for name in honest:
        yield "evaluations", f"no {name}", {n: v for n, v in honest.items() if n != name}
        for value in BAD_NUMBERS:
            yield "evaluations", f"{name} = {value}", honest | {name: value}
    for name in ("x.examples", ".examples", "x.accuracy", "[/x].examples", "\x1b.examples"):
        yield "evaluations", f"{name!r} alone", honest | {name: 5}
    yield "evaluations", "low and high", honest | {"low": 7.0, "high": -7.0}
    yield "evaluations", "100 000 figures", honest | {f"f{i}": 1.0 for i in range(100_000)}


@dataclass(frozen=True)
class Played:
    """What came of one attack: its kind, whether it was merged, how far it moved, seconds, MiB."""

    group: str
    name: str
    kind: str
    merged: bool
    moved: float
    seconds: float
    mib: float


def resident() -> float:
    """Peak of resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def play_trainings(arena: Arena, every: int = 1) -> Iterator[Played]:
    """Every hostile training reply (or each ``every``-th) in a round of its own.

    Raises
    ------
    AssertionError
        If it cost more than its own update.
    """
    for group, name, attack in itertools.islice(training_attacks(), 0, None, every):
        try:
            attack(clone(arena.honest[HOSTILE]))
        except TypeError:
            continue  # Flower's own records do not hold it
        sent, before, began = attack(clone(arena.honest[HOSTILE])), resident(), time.perf_counter()
        adapter, outcomes = arena.play(lambda reply, sent=sent: sent)
        seconds, mib = time.perf_counter() - began, resident() - before
        own = outcomes[HOSTILE]
        others = [o for i, o in enumerate(outcomes) if i != HOSTILE]
        assert all(o.merged for o in others), f"{name}: others were dropped: {others}"
        moved = arena.moved(adapter)
        assert own.merged or moved == 0, f"{name}: dropped, and yet the adapter moved by {moved}"
        assert moved <= arena.allowed, f"{name}: moved by {moved}, allowed are {arena.allowed}"
        assert all(bool(t.isfinite().all()) for t in adapter.state_dict().values()), name
        assert set(own.metrics) <= {*replies.TRAINING, *OWN_FIGURES}
        assert own.reason.isprintable() and len(own.reason) <= 300, f"{name}: {own.reason!r}"
        json.dumps(dict(own.metrics), allow_nan=False)
        yield Played(group, name, own.kind or "merged", own.merged, moved, seconds, mib)


def play_reports(arena: Arena) -> Iterator[Played]:
    """Every hostile report, read and planned for beside an honest fleet."""
    honest = {c: d.report for c, d in arena.strategy.fleet.devices.items()}
    expected = arena.strategy.planner.plan_fleet(honest, 1)
    for group, name, (field, value) in report_attacks():
        reply = clone(arena.report)
        record = dict(reply.content["device"])
        record.pop(field)
        try:
            reply.content["device"] = ConfigRecord(
                record | ({} if value is None else {field: value})
            )
        except TypeError:
            continue
        began, kind = time.perf_counter(), "used"
        try:
            report = replies.read_report(reply)
            plans = arena.strategy.planner.plan_fleet(honest | {"hostile": report}, 1)
            assert {c: plans[c] for c in honest} == expected, f"{name}: another's plan moved"
        except replies.Refused as refused:
            kind = refused.kind
        yield Played(group, name, kind, kind == "used", 0.0, time.perf_counter() - began, 0.0)
    arena.strategy.planner.plan_fleet(honest, 1)


def play_evaluations(arena: Arena) -> Iterator[Played]:
    """Every hostile evaluation among two honest ones of accuracy .5."""

    def reply_of(figures: dict[str, Any]) -> Message:
        reply = clone(arena.honest[0])
        reply.content["metrics"] = MetricRecord(figures)
        return reply

    honest = {"num-examples": 100, "accuracy": 0.5, "macro-f1": 0.5, "micro-f1": 0.5, "loss": 1.0}
    for group, name, figures in evaluation_attacks():
        try:
            sent = [reply_of(honest), reply_of(figures), reply_of(honest)]
        except TypeError:
            continue
        began = time.perf_counter()
        found = arena.strategy.evaluated(sent)
        assert set(found) == set(honest) - {"num-examples"}, f"{name}: {found}"
        assert all(math.isfinite(value) for value in found.values()), name
        moved = abs(found["accuracy"] - 0.5)
        assert moved <= 0.5, name
        yield Played(group, name, "read", True, moved, time.perf_counter() - began, 0.0)


def mutate(arena: Arena, count: int, seed: int = 0) -> dict[str, Any]:
    """Change replies at random; each reader must answer or refuse, in time and memory."""
    draw = random.Random(seed)
    arena.strategy.open_round(1, arena.start, arena.grid)
    assignment = arena.strategy.assignments[HOSTILE]
    identity = arena.strategy.identity
    wire = arena.settings.wire.dtype
    honest = arena.honest[HOSTILE]
    data = next(iter(honest.content["adapter"].values())).data
    shape = next(iter(honest.content["adapter"].values())).shape

    def bent(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 2, 8))):
            if not changed:
                break
            place = draw.randrange(min(len(changed), draw.choice((16, 128, len(changed)))))
            how = draw.randrange(4)
            if how == 0:
                changed[place] = draw.randrange(256)
            elif how == 1:
                del changed[place : place + draw.randrange(1, 9)]
            elif how == 2:
                changed[place:place] = draw.randbytes(draw.randrange(1, 9))
            else:
                changed = changed[: max(1, place)]
        return bytes(changed)

    def any_number() -> Any:
        choice = draw.randrange(5)
        if choice == 0:
            return draw.choice(BAD_NUMBERS)
        if choice == 1:
            return draw.randint(-(2**63), 2**63 - 1)
        if choice == 2:
            return math.ldexp(draw.uniform(-1, 1), draw.randint(-1070, 1023))
        return draw.randint(-3, 300)

    def array() -> None:
        read_npy(bent(data), ("float32", shape))

    def metrics() -> None:
        reply = clone(honest)
        names = draw.sample(sorted(replies.TRAINING), draw.randint(1, 4))
        record = dict(reply.content["metrics"]) | {name: any_number() for name in names}
        reply.content["metrics"] = MetricRecord(record)
        replies.read_metrics(reply, assignment, 1, identity)

    def update() -> None:
        reply = clone(honest)
        arrays = dict(reply.content["adapter"])
        for name in draw.sample(sorted(arrays), draw.randint(1, 3)):
            own = arrays[name]
            arrays[name] = Array(own.dtype, own.shape, own.stype, bent(own.data))
        reply.content["adapter"] = ArrayRecord(arrays)
        found = replies.read_metrics(reply, assignment, 1, identity)
        replies.read_update(reply, assignment, found, wire)

    def report() -> None:
        reply = clone(arena.report)
        record = dict(reply.content["device"])
        for field in draw.sample(sorted(record), draw.randint(1, 3)):
            text = draw.choice(BAD_TEXTS) + draw.choice(BAD_TEXTS)
            record[field] = draw.choice((any_number(), text[: draw.randrange(200)]))
        reply.content["device"] = ConfigRecord(record)
        replies.read_report(reply)

    def evaluation() -> None:
        reply = clone(honest)
        names = [*replies.EVALUATION, "g.accuracy", "g.examples", "g.low", "g.high"]
        figures = {
            "num-examples": 9,
            "accuracy": 0.1,
            "macro-f1": 0.1,
            "micro-f1": 0.1,
            "loss": 1.0,
        }
        figures |= {name: any_number() for name in draw.sample(names, 3)}
        reply.content["metrics"] = MetricRecord(figures)
        replies.read_evaluation(reply, arena.settings)

    sentence = Fault("data-label", row=7, kind="ValueError", text="a text").written()

    def failure() -> None:
        text = bent(sentence.encode()).decode("utf-8", draw.choice(("replace", "surrogateescape")))
        text = draw.choice((text, sentence + draw.choice(BAD_TEXTS), draw.choice(BAD_TEXTS)))
        found = replies.read_failure(failing(text, draw.randint(-3, 300))(honest))
        assert found.reason.isprintable() and len(found.reason) <= 300, text

    results: dict[str, Any] = {}
    for name, parse in (("array bytes", array), ("metrics", metrics), ("update", update),
                        ("device report", report), ("evaluation", evaluation),
                        ("failure", failure)):  # fmt: skip
        tally, slowest, before, done = Counter[str](), 0.0, resident(), 0
        while done < count:
            began = time.perf_counter()
            try:
                parse()
                tally["read"] += 1
            except (replies.Refused, WireError):
                tally["refused"] += 1
            except TypeError as error:
                if "flwr" not in str(error) and "Record" not in str(error) and not _flowers(error):
                    raise
                continue  # Flower's own records do not hold it
            done += 1
            slowest = max(slowest, time.perf_counter() - began)
        growth = resident() - before
        assert slowest < 1.0, f"{name}: {slowest:.2f} s"
        assert growth < 100, f"{name}: {growth:.0f} MiB"
        results[name] = {
            **tally,
            "slowest-seconds": round(slowest, 4),
            "growth-mib": round(growth, 1),
        }
    return results


def _flowers(error: BaseException) -> bool:
    """Whether an error was raised inside Flower."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "flwr" in trace.tb_frame.f_code.co_filename


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """The tables of docs/security.md. Whatever ends a run or another's update ends this command."""
    yield "| attacks on | number | refused | used | moved the merged adapter most |"
    yield "|---|---|---|---|---|"
    for group, own in record["attacks"].items():
        counts = " | ".join(str(own[key]) for key in ("attacks", "refused", "used"))
        yield f"| {group} | {counts} | {own['moved-most']:.2f} |"
    yield ""
    yield "| mutations of | read | refused | slowest, ms | memory growth, MiB |"
    yield "|---|---|---|---|---|"
    for parser, own in record["mutations"].items():
        counts = " | ".join(f"{own.get(key, 0):,}" for key in ("read", "refused"))
        slowest, growth = 1000 * own["slowest-seconds"], own["growth-mib"]
        yield f"| {parser} | {counts} | {slowest:.0f} | {growth:.0f} |"


def main() -> None:
    """Play all attacks and mutations; print and write what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=50_000, help="of each parser")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # one line for each refusal is right, and too much here
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(Path(folder))
        played = [*play_trainings(arena), *play_reports(arena), *play_evaluations(arena)]
        mutated = mutate(arena, options.mutations) if options.mutations else {}
    groups: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(p.group for p in played):
        own = [p for p in played if p.group == group]
        groups[group] = {
            "attacks": len(own),
            "refused": sum(not p.merged for p in own),
            "used": sum(p.merged for p in own),
            "moved-most": round(max(p.moved for p in own), 4),
            "kinds": dict(Counter(p.kind for p in own)),
            "slowest-seconds": round(max(p.seconds for p in own), 3),
        }
    record = {"benchmark": "attacks", **machine("torch", "flwr"), "attacks": groups}
    record |= {"moved-allowed": arena.allowed, "mutations": mutated}
    write_record(options.output, record)
    for line in tables(record):
        print(line)
    if options.output == RESULT:
        write_table(DOCUMENT, "attacks", tables(record))


if __name__ == "__main__":
    main()
