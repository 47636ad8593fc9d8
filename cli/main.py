"""The ``rankfit`` command."""

import json
import logging
import os
import sys
from collections.abc import Callable
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

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
#: One whole command line for each command, shown below its help.
EXAMPLES = {
    "run": "rankfit run quickstart run.name=first run.rounds=5",
    "resume": "rankfit resume runs/first run.rounds=10",
    "presets": "rankfit presets",
    "settings": "rankfit settings quickstart train.epochs=2 > mine.toml",
    "methods": "rankfit methods",
    "version": "rankfit version",
    "compare": "rankfit compare quickstart --methods rankfit,hetlora --seeds 0,1",
    "probe": "rankfit probe --format json",
    "estimate": "rankfit estimate quickstart --memory-mib 16",
    "calibrate": "rankfit calibrate --out calibration.toml",
    "memory-report": "rankfit memory-report runs/first",
    "evaluate": "rankfit evaluate runs/first --best --split test",
    "export": "rankfit export runs/first --best --to adapter",
    "generate": 'rankfit generate runs/first "Name three fruits."',
}


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command under a name, with its example."""
    return app.command(name, epilog=f"Example: {EXAMPLES[name]}")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog=f"Example: {EXAMPLES['run']}")
def rankfit(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Federated LoRA fine-tuning across machines whose GPUs differ."""


app.add_typer(node.app, name="node")
command("compare")(compare)
command("probe")(estimate.probe)
command("estimate")(estimate.estimate)
command("calibrate")(calibrate)
command("memory-report")(memory_report)
command("evaluate")(evaluate)
command("export")(export)
command("generate")(generate)
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


@command("run")
def run(parts: Parts, superlink: SuperLink = None) -> None:
    """Run a federated fine-tune through Flower; exits non-zero when the run failed."""
    path = api.run(*parts, superlink=superlink)
    _errors.print(f"Run directory: {path}", highlight=False, soft_wrap=True)


@command("resume")
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


@command("presets")
def presets() -> None:
    """List the presets that come with RankFit."""
    for name in preset_names():
        typer.echo(name)


@command("settings")
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


@command("methods")
def methods() -> None:
    """List the catalogue of methods."""
    from rankfit.strategies.methods import methods as catalogue

    table = Table("method", "what it does", "can be left out", "source")
    for name, method in sorted(catalogue().items()):
        table.add_row(name, method.summary, ", ".join(method.parts), method.source)
    Console(markup=False).print(table)


@command("version")
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
    except Exception as error:
        if not _can_be_mended(error):
            raise
        show_error(str(error))
        _exit(1 if isinstance(error, FlowerError) else 2)


def _can_be_mended(error: Exception) -> bool:
    """Whether the user can do something about an error, so that a traceback would only hide it."""
    # Imported here, as numpy is: `rankfit --help` should not wait for it.
    from rankfit.tasks.model_sources import ModelError
    from rankfit.tasks.records import DataError

    return isinstance(error, ConfigError | FlowerError | DataError | ModelError)


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
