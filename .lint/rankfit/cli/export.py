"""``rankfit export``: a checkpoint for use with plain transformers and PEFT."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankfit.cli.evaluate import Round, Run
from rankfit.configs.settings import ConfigError


def export(
    run: Run,
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    number: Round = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model, with the adapter in its weights.")
    ] = False,
    client: Annotated[
        int | None,
        typer.Option(help="Partition whose own head goes along (head.mode local)."),
    ] = None,
) -> None:
    """Write the adapter in PEFT's format, or the merged model, with a card."""
    from rankfit.client.store import ClientStore
    from rankfit.server.export import export as write
    from rankfit.server.saved import SavedRun

    saved = SavedRun.open(run, number)
    own = None
    if client is not None:
        store = ClientStore.of(saved.settings, "heads", client, None, saved.identity)
        head = store.load(saved.round + 1)
        if saved.settings.head.mode != "local" or head is None:
            raise ConfigError(f"--client {client}: {saved.path} keeps no head of that partition")
        own = replace(saved.adapter, head=head)
    folder = write(saved, to.expanduser().resolve(), merged=merged, head=own)
    Console(stderr=True).print(f"Exported: {folder}", highlight=False, soft_wrap=True)
