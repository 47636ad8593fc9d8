"""``rankfit node``: what runs for this machine's SuperNodes, and what their policy allows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rankfit.client.worker_registry import WorkerDir

app = typer.Typer(
    invoke_without_command=True,
    help="Workers of this machine's SuperNodes.",
    epilog="Example: rankfit node --stop-workers",
)


@app.callback()
def node(
    context: typer.Context,
    stop_workers: Annotated[
        bool, typer.Option("--stop-workers", help="End all of this user's workers.")
    ] = False,
) -> None:
    """List the workers that keep a model for a SuperNode, or end them."""
    if context.invoked_subcommand is not None:
        return
    # Imported here: it needs Unix, and the rest of the command does not.
    from rankfit.client.worker_registry import WorkerDirError, stop, worker_dirs

    try:
        found = worker_dirs()
    except WorkerDirError as error:
        raise typer.BadParameter(str(error)) from error
    if stop_workers:
        for place in found:
            stop(place)
        typer.echo(f"stopped {len(found)} worker{'' if len(found) == 1 else 's'}")
        return
    table = Table("process", "run", "node", "state", "log")
    for place in found:
        table.add_row(*_row(place))
    Console(markup=False).print(table)


@app.command(epilog="Example: rankfit node policy digits --policy policy.toml")
def policy(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="PRESET… [KEY=VALUE…]", help="A run: presets and settings."),
    ],
    file: Annotated[
        str, typer.Option("--policy", help="The policy file (default: that of a node without one).")
    ] = "",
    data_path: Annotated[
        str | None, typer.Option(help="The node config's data-path, if it has one.")
    ] = None,
) -> None:
    """Check what a run asks for against a node's policy; exits 1 if anything is refused."""
    from rankfit.client.policy import Policy
    from rankfit.configs.compose import compose

    found = Policy.read(Path(file).expanduser()) if file else Policy()
    refusals = list(found.refusals(compose(parts), data_path))
    for refusal in refusals:
        typer.echo(f"refused [{refusal.coded.code}]: {refusal}")
    if refusals:
        raise typer.Exit(1)
    typer.echo("nothing is refused that the settings tell of")
    for line in found.later():
        typer.echo(f"checked on the node: {line}")


def _row(place: "WorkerDir") -> tuple[str, ...]:
    """One line of the table; a worker that is just ending leaves blanks."""
    process = place.process()
    pid = str(process.pid) if process else "?"
    state = "alive" if place.alive() else "dead"
    try:
        start = place.read()
    except (OSError, ValueError):
        return pid, "", "", state, ""
    return pid, str(start.spec.run_id), str(start.spec.node_id), state, str(start.log)
