"""``rankfit evaluate``, ``export`` and ``generate``: what a checkpoint is used for."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rankfit.configs.settings import ConfigError

if TYPE_CHECKING:
    from rankfit.server.run_directory import SavedRun

Figures = Mapping[str, float]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Round = Annotated[
    int | None, typer.Option("--round", help="Round of the checkpoint (default: the newest).")
]
Best = Annotated[
    bool, typer.Option("--best", help="The checkpoint of the best round by best.metric.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE…]", help="For example task.evaluate=likelihood."),
]


def evaluate(
    run: Run,
    overrides: Overrides = None,
    number: Round = None,
    best: Best = False,
    split: Annotated[
        str, typer.Option(help="train, test, holdout, or another split or file of the data.")
    ] = "test",
    clients: Annotated[
        bool,
        typer.Option(
            "--clients", help="One line for each client: its own test part, its own head if any."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file too.")
    ] = None,
) -> None:
    """Measure a checkpoint of a run."""
    from rankfit.server.run_directory import SavedRun

    changes = list(overrides or [])
    if split not in ("train", "test", "holdout"):
        changes.append(f"data.test={split}")
    if clients:
        changes.append("server.evaluate=clients")
    saved = SavedRun.open(run, number, changes, best=best)
    found = by_client(saved) if clients else {split: _whole(saved, split)}
    Console(markup=False).print(_table(found, f"{saved.path.name}, round {saved.round}"))
    if output is not None:
        record = {"run": saved.path.name, "round": saved.round, "figures": found}
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def by_client(saved: "SavedRun") -> dict[str, dict[str, float]]:
    """Figures of each simulated client on its own test part, with its own head if it keeps one.

    Raises
    ------
    ConfigError
        If the clients' data is not here.
    """
    from rankfit.client.trainer import evaluate as measure
    from rankfit.client.workspace import Workspace
    from rankfit.server.reporting import PARTITION

    if saved.settings.partition.kind == "local":
        raise ConfigError("--clients: the data of this run lies with its clients (partition local)")
    space = Workspace(saved.settings, None)
    # As many as took part: a deployment's nodes say how many share the data.
    record = json.loads((saved.path / PARTITION).read_text(encoding="utf-8"))
    count = len(record["clients"])
    found = {}
    for client in range(count):
        samples = space.test_samples(client, count)
        if not len(samples):
            continue
        store = space.head_store(client, saved.identity)
        head = store.load(saved.round + 1) if store else None
        figures = measure(space, saved.adapter, samples, head)
        found[f"partition-{client}"] = {**figures, "examples": len(samples)}
    return found


def _whole(saved: "SavedRun", split: str) -> dict[str, float]:
    if saved.settings.head.mode == "local":
        raise ConfigError(f"{saved.path}: every client has its own head; measure with --clients")
    task = saved.task
    if split == "holdout" and not saved.settings.best.held_out:
        raise ConfigError(f"{saved.path} holds nothing back: it ran without best.metric")
    parts = {"train": lambda: task.train, "holdout": lambda: task.holdout}
    return saved.evaluator().on(saved.adapter, parts.get(split, lambda: task.test)())


def _table(found: Mapping[str, Figures], title: str) -> Table:
    names = list(next(iter(found.values())))
    table = Table(title=title, title_justify="left")
    if len(found) == 1:  # a figure a line: the suites have many
        table.add_column(next(iter(found)))
        table.add_column("", justify="right")
        for name, value in next(iter(found.values())).items():
            table.add_row(name, _shown(value))
        return table
    table.add_column("client")
    for name in names:
        table.add_column(name, justify="right")
    for client, figures in found.items():
        table.add_row(client, *(_shown(figures[name]) for name in names))
    means = [sum(one[name] for one in found.values()) / len(found) for name in names]
    table.add_section()
    table.add_row("mean", *(_shown(value) for value in means))
    return table


def _shown(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and value > 1 else f"{value:.4f}"


def export(
    run: Run,
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    number: Round = None,
    best: Best = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model, with the adapter in its weights.")
    ] = False,
    client: Annotated[
        int | None,
        typer.Option(help="Partition whose own head goes along (head.mode local)."),
    ] = None,
) -> None:
    """Write the adapter in PEFT's format, or the merged model, with a card."""
    from rankfit.client.workspace import ClientStore
    from rankfit.server.export import export as write
    from rankfit.server.run_directory import SavedRun

    saved = SavedRun.open(run, number, best=best)
    own = None
    if client is not None:
        store = ClientStore.of(saved.settings, "heads", client, None, saved.identity)
        head = store.load(saved.round + 1)
        if saved.settings.head.mode != "local" or head is None:
            raise ConfigError(f"--client {client}: {saved.path} keeps no head of that partition")
        own = replace(saved.adapter, head=head)
    folder = write(saved, to.expanduser().resolve(), merged=merged, head=own)
    Console(stderr=True, markup=False).print(f"Exported: {folder}", highlight=False, soft_wrap=True)


def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="An instruction; - reads it from standard input.")],
    number: Round = None,
    best: Best = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that are written at most.")
    ] = 128,
) -> None:
    """Answer one instruction, asked as in training; greedy."""
    from rankfit.server.run_directory import SavedRun
    from rankfit.tasks.generation import write
    from rankfit.tasks.language_model import LanguageTask

    changes = [f"task.max-new-tokens={max_new_tokens}"]
    saved = SavedRun.open(run, number, changes, best=best)
    if saved.settings.task.kind != "causal-lm":
        raise ConfigError(
            f"{saved.path} trained {saved.settings.task.kind}; only a causal-lm writes text"
        )
    task = saved.task
    assert isinstance(task, LanguageTask)
    evaluator = saved.evaluator()
    model = evaluator.hold(saved.adapter).eval()
    text = sys.stdin.read() if prompt == "-" else prompt
    tokens = task.encoder.question(text, task.form, task.room)
    (answer,) = write(
        model,
        task.encoder.tokenizer,
        [tokens],
        evaluator.device,
        size=1,
        new_tokens=max_new_tokens,
    )
    typer.echo(answer)
