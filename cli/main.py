"""The ``rankfit`` command."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankfit import __version__
from rankfit.cli import api, estimate, node
from rankfit.cli.checkpoints import evaluate, export, generate
from rankfit.cli.compare import compare
from rankfit.cli.flower import FlowerError, Interrupted
from rankfit.cli.memory_commands import calibrate, memory_report
from rankfit.configs.compose import compose, preset_names
from rankfit.configs.settings import ConfigError
from rankfit.tasks.model_sources import ModelError
from rankfit.tasks.records import DataError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated LoRA fine-tuning across machines whose GPUs differ.",
)
app.add_typer(node.app, name="node")
app.command()(compare)
app.command()(estimate.probe)
app.command()(estimate.estimate)
app.command()(calibrate)
app.command("memory-report")(memory_report)
app.command()(evaluate)
app.command()(export)
app.command()(generate)
_errors = Console(stderr=True, markup=False)

Parts = Annotated[
    list[str],
    typer.Argument(
        metavar="PRESET… [KEY=VALUE…]",
        help="Presets (names, or paths of .toml files) and settings, later ones winning.",
    ),
]
SuperLink = Annotated[
    str | None,
    typer.Option(
        help="Name of a SuperLink connection in Flower's config (default: simulate here)."
    ),
]


@app.command()
def run(parts: Parts, superlink: SuperLink = None) -> None:
    """Run a federated fine-tune through Flower; exits non-zero when the run failed."""
    path = api.run(*parts, superlink=superlink)
    _errors.print(f"Run directory: {path}", highlight=False, soft_wrap=True)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE…]", help="For example run.rounds=300.")
    ] = None,
    superlink: SuperLink = None,
) -> None:
    """Continue an interrupted run from its last checkpoint."""
    path = api.resume(directory, *(overrides or []), superlink=superlink)
    _errors.print(f"Run directory: {path}", highlight=False, soft_wrap=True)


@app.command()
def presets() -> None:
    """List the presets that come with RankFit."""
    for name in preset_names():
        typer.echo(name)


@app.command()
def settings(
    parts: Annotated[
        list[str] | None, typer.Argument(metavar="[PRESET… KEY=VALUE…]", show_default=False)
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema of such files instead.")
    ] = False,
) -> None:
    """Print every setting with its value and meaning, as a TOML file that `rankfit run` reads."""
    from rankfit.configs.flower_defaults import commented
    from rankfit.configs.flower_defaults import schema as json_schema

    if schema:
        typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))
    else:
        typer.echo(commented(compose(parts or [])), nl=False)


@app.command()
def methods() -> None:
    """List the catalogue of methods."""
    from rankfit.strategies.methods import methods as catalogue

    table = Table("method", "what it does", "can be left out", "source")
    for name, method in sorted(catalogue().items()):
        table.add_row(name, method.summary, ", ".join(method.parts), method.source)
    Console(markup=False).print(table)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: errors that a user can mend are one line, without a traceback."""
    logging.basicConfig(level=os.environ.get("RANKFIT_LOG", "WARNING"), format="%(message)s")
    logging.getLogger("rankfit.cli").setLevel(logging.INFO)
    try:
        app()
    except Interrupted as error:
        _errors.print(str(error), highlight=False, soft_wrap=True, markup=False)
        sys.exit(130)
    except (ConfigError, FlowerError, DataError, ModelError) as error:
        show_error(str(error))
        _exit(1 if isinstance(error, FlowerError) else 2)


def _exit(status: int) -> NoReturn:
    """End at once: Python would spend one to two seconds on taking torch apart."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def show_error(message: str) -> None:
    """Print an error as it is: brackets in it are text, not rich's markup."""
    line = Text.assemble(("error: ", "bold red"), message)
    _errors.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
