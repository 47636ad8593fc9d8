"""What hostile clients send costs them their own update, and nobody's run.

The attacks are those of ``benchmarks/attacks.py``; its command plays them with 50 000 mutations of
each parser.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord

from benchmarks.attacks import (
    Arena,
    mutate,
    play_evaluations,
    play_reports,
    play_trainings,
    training_attacks,
)
from rankfit.strategies.fleet import natural
from tests.server.federation import Fault, FaultyGrid, run, settings_for


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    logging.disable(logging.ERROR)
    yield Arena(tmp_path_factory.mktemp("arena"))
    logging.disable(logging.NOTSET)


def test_no_hostile_update_costs_more_than_itself(arena: Arena) -> None:
    played = list(play_trainings(arena))
    assert len(played) >= 150 and len(list(training_attacks())) >= len(played)
    assert max(p.seconds for p in played) < 5
    refused = Counter(p.kind for p in played if not p.merged)
    for kind in ("bad figure", "bad arrays", "wrong names", "not finite", "too large",
                 "too long a change", "wrong round", "client error", "no answer"):  # fmt: skip
        assert refused[kind], f"no attack was refused as {kind}: {refused}"


def test_no_hostile_report_moves_the_plan_of_another(arena: Arena) -> None:
    assert len(list(play_reports(arena))) >= 40


def test_no_hostile_evaluation_falsifies_more_than_its_share(arena: Arena) -> None:
    assert len(list(play_evaluations(arena))) >= 20


def test_no_mutation_of_a_reply_raises_anything_but_a_refusal(arena: Arena) -> None:
    results = mutate(arena, 400, seed=1)
    failures = results.pop("failure")
    assert set(failures) == {"read", "slowest-seconds", "growth-mib"}, "each is one line of text"
    assert all(found["refused"] for found in results.values())


def claiming(number: int) -> Fault:
    def fault(message: Message, reply: Message) -> Message:
        metrics = dict(reply.content["metrics"])
        reply.content["metrics"] = MetricRecord(metrics | {"num-examples": number})
        return reply

    return fault


def replaying() -> Fault:
    kept: list[Message] = []

    def fault(message: Message, reply: Message) -> Message:
        kept.append(reply)
        reply.content.update(kept[0].content)
        return reply

    return fault


def markup(message: Message, reply: Message) -> Message:
    reply.content["metrics"] = MetricRecord(
        dict(reply.content["metrics"]) | {"merged": 0, "reason": 7, "[/x]\x1b[2J": 1.0}
    )
    return reply


def scaled(message: Message, reply: Message) -> Message:
    record = reply.content["adapter"]
    arrays = {n: Array(np.asarray(a.numpy() * np.float32(300))) for n, a in record.items()}
    reply.content["adapter"] = ArrayRecord(arrays)
    return reply


def test_a_run_under_attack_goes_on_and_says_what_it_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path, "under", "run.rounds=2")
    faults = {0: claiming(10**9), 1: replaying(), 2: scaled, 3: markup}
    folder = run(settings, faults)
    first, second = (
        json.loads(line)["clients"]
        for line in (folder / "rounds.jsonl").read_text().splitlines()[1:]
    )
    assert first["partition-0"]["merged"] and first["partition-0"]["num-examples"] < 10**3
    assert first["partition-1"]["merged"] and second["partition-1"]["kind"] == "wrong round"
    assert second["partition-2"]["kind"] == "too long a change"
    assert second["partition-3"]["merged"] and "reason" not in second["partition-3"]
    shown = capsys.readouterr().out
    assert "updates were merged; not: 2 × too long a change, 1 × wrong round" in shown
    assert "\x1b[2J" not in shown


def test_hostile_names_reach_tables_files_and_the_report_as_plain_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {0: "[/bold]evil\x1b[2J", 1: "node-²", 2: "x" * 10**6, 3: "a\nround 9/9"}

    class Named(FaultyGrid):
        def _handle(self, message: Message) -> Message:
            reply = super()._handle(message)
            if message.metadata.message_type == "query.capabilities":
                record = dict(reply.content["device"])
                record["client"] = names[message.metadata.dst_node_id - 1000]
                record["name"] = "[red]GPU[/blue]"
                reply.content["device"] = ConfigRecord(record)
            return reply

    from rankfit.server.loop import federate

    settings = settings_for(tmp_path, "names", "run.rounds=1")
    federate(Named(settings, {}), settings)
    line = json.loads((tmp_path / "names" / "rounds.jsonl").read_text().splitlines()[-1])
    assert line["updates"] == 4 and all(len(name) <= 64 for name in line["clients"])
    shown = capsys.readouterr().out
    assert "[/bold]evil" in shown and "\x1b[2J" not in shown and "\nround 9/9" not in shown
    assert sorted(["node-²", "node-10", "node-9"], key=natural) == ["node-9", "node-10", "node-²"]
