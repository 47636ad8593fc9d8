"""The command: one line for an error that a user can mend, and what it gives to Flower."""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from rich.table import Table
from typer.main import get_command
from typer.testing import CliRunner

from rankfit import __version__
from rankfit.cli import api
from rankfit.cli.flower import (
    FlowerError,
    app_directory,
    environment,
    federation_config,
    flower_command,
)
from rankfit.cli.main import app
from rankfit.configs.compose import compose, from_here, without_places
from rankfit.configs.learning import _SYNONYMS, nearest
from rankfit.configs.settings import ConfigError, known_keys, to_flat
from rankfit.server.reporting import console
from tests.conftest import ROOT


def rankfit(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "rankfit.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "quikstart"), "unknown preset 'quikstart'; did you mean 'quickstart'?"),
        (("run", "quickstart", "method.name=fedavg"), "unknown method 'fedavg'"),
        (("run", "quickstart", "run.round=3"), "did you mean 'run.rounds'"),
        (("resume", "no/such/run"), "holds no run"),
        (("run", "quickstart", "train.lr=1"), "did you mean 'train.learning-rate'"),
        # Text of an error is no markup, whatever brackets are in it.
        (("run", "[/nope]"), "unknown preset '[/nope]'"),
        (("run", "quickstart", "run.[red]x=1"), "unknown setting 'run.[red]x'"),
        (("estimate", "quickstart", "--fleet", os.devnull), "holds no [[device]] table"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = rankfit(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_table_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[bold]name[/bold]", title="[x]")
    table.add_row("[/nope]")
    console().print(table)
    assert "[bold]name[/bold]" in (shown := capsys.readouterr().out) and "[/nope]" in shown


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "train.learning-rate"),
        ("train.learning_rate", "train.learning-rate"),
        ("optim.lr", "train.learning-rate"),
        ("epochs", "train.epochs"),
        ("bs", "train.batch-size"),
        ("per_device_train_batch_size", "train.batch-size"),
        ("lora.r", "lora.rank"),
        ("target_modules", "lora.targets"),
        ("data.rank", "lora.rank"),
        ("num-clients", "simulation.clients"),
        ("max_seq_length", "data.max-length"),
        ("data.soruce", "data.source"),
        ("nothing-like-it", None),
    ],
)
def test_a_setting_is_found_by_the_names_that_others_have_for_it(
    key: str, meant: str | None
) -> None:
    assert nearest(key, known_keys()) == meant


def test_every_synonym_names_a_setting() -> None:
    assert set(_SYNONYMS) <= set(known_keys())
    names = [name for names in _SYNONYMS.values() for name in names.split()]
    assert len(names) == len(set(names))


def test_paths_are_seen_from_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``./x``, ``~``, and a bare name that is there are this machine's; others are the hub's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bare").mkdir()
    (tmp_path / "model.json").write_text("{}")
    expected = {
        "./images": tmp_path / "images",
        "~/images": tmp_path / "images",
        "bare": tmp_path / "bare",
        str(tmp_path / "x"): tmp_path / "x",
        "org/name": "org/name",
        "sklearn:digits": "sklearn:digits",
    }
    for written, meant in expected.items():
        assert from_here(compose([f"data.source={written}"])).data.source == str(meant)
    moved = from_here(compose(["model.source=config:model.json", "run.directory=here"]))
    assert moved.model.source == f"config:{tmp_path / 'model.json'}"
    assert moved.run.directory == str(tmp_path / "here")
    shown = without_places(from_here(compose(["data.source=./images", "model.source=bare"])))
    assert (shown.data.source, shown.model.source) == ("./images", "./bare")
    assert str(tmp_path) not in str(to_flat(shown))


def test_a_path_seen_from_here_is_refused_for_other_machines() -> None:
    with pytest.raises(ConfigError, match=r"data.source './x' is seen from here"):
        api.run("quickstart", "data.source=./x", superlink="far")


def test_a_run_directory_in_use_is_refused_before_flower_starts(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="rankfit resume"):
        api.run("quickstart", f"run.directory={tmp_path}", "run.name=taken")


def test_presets_settings_and_methods_are_listed() -> None:
    assert "quickstart" in rankfit("presets").stdout
    assert "lora.rank = 8" in rankfit("settings", "quickstart").stdout
    assert "FlexLoRA" in rankfit("methods").stdout


def test_a_simulation_is_sized_by_the_settings() -> None:
    settings = compose(["quickstart", "simulation.clients=5", "simulation.gpus-per-client=0.25"])
    assert federation_config(settings) == (
        "num-supernodes=5 client-resources-num-cpus=1 client-resources-num-gpus=0.25"
    )


def test_a_users_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = environment(threads=3)
    assert made["FLWR_TELEMETRY_ENABLED"] == "1"
    assert made["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert made["OMP_NUM_THREADS"] == "3"


def test_a_missing_flower_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FlowerError, match="no-such-flwr is not installed"):
        flower_command("no-such-flwr")


def test_the_installed_wheel_lays_out_the_same_app(tmp_path: Path) -> None:
    """From a wheel there is no checkout: the app that Flower bundles is put together from it."""
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--target", str(tmp_path / "installed"), str(Path(__file__).parents[2]),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    script = (
        "import sys, shutil; from rankfit.cli.flower import app_directory\n"
        "with app_directory() as app: shutil.copytree(app, sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    laid_out = tmp_path / "app"
    subprocess.run(
        [sys.executable, "-c", script, str(laid_out)],
        check=True, env=environment, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    built = [_bundle(app, tmp_path / name) for app, name in _apps(laid_out)]
    assert built[0] == built[1]
    config = tomllib.loads((laid_out / "pyproject.toml").read_text())
    assert config["tool"]["flwr"]["app"]["components"]["serverapp"] == "rankfit.server_app:app"


def test_flower_finds_one_app_while_it_imports_the_other(tmp_path: Path) -> None:
    """As its simulation does, in two threads; the import is slowed to hold the moment open."""
    with app_directory() as app:
        shutil.copytree(app / "rankfit", tmp_path / "rankfit")
    start = tmp_path / "rankfit" / "__init__.py"
    start.write_text("import time; time.sleep(1)\n" + start.read_text())
    script = (
        "import sys, threading, time; from flwr.supercore.object_ref import validate\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "threading.Thread(target=lambda: __import__('rankfit')).start()\n"
        "while 'rankfit' not in sys.modules: time.sleep(0.01)\n"
        "found = validate(sys.argv[2], project_dir=sys.argv[1])\n"
        "assert found == (True, None), found"
    )
    config = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    for reference in config["tool"]["flwr"]["app"]["components"].values():
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), reference],
            cwd=tmp_path, timeout=60, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def _apps(laid_out: Path) -> list[tuple[Path, str]]:
    with app_directory() as checkout:
        return [(checkout, "one"), (laid_out, "two")]


def _bundle(app: Path, folder: Path) -> set[str]:
    """Names of the files that Flower puts into the bundle of an app."""
    import zipfile

    folder.mkdir()
    subprocess.run(
        [flower_command("flwr"), "build", "--app", str(app)],
        check=True, cwd=folder, capture_output=True, timeout=60,
    )  # fmt: skip
    with zipfile.ZipFile(next(folder.glob("*.fab"))) as bundle:
        return {name for name in bundle.namelist() if not name.startswith(".info")}


#: What takes long to import, and is not needed to say what a command does.
HEAVY = ("torch", "transformers", "peft", "flwr", "ray", "accelerate", "datasets", "numpy")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom rankfit.cli.main import main\ntry:\n    main()\nexcept SystemExit:\n"
        "    print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "'typer'" in done.stderr and not [m for m in HEAVY if f"'{m}'" in done.stderr]


def test_the_version() -> None:
    for arguments in (["--version"], ["version"]):
        done = CliRunner().invoke(app, arguments)
        assert (done.exit_code, done.output) == (0, f"{__version__}\n")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group with the words that call it."""
    for name, command in group.commands.items():
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_an_example_that_it_understands(name: str) -> None:
    command, epilog = COMMANDS[name], COMMANDS[name].epilog or ""
    assert epilog.startswith(f"Example: rankfit {name}"), name
    words = shlex.split(epilog.partition(" > ")[0].removeprefix("Example: rankfit "))
    command.make_context(name, words[len(name.split()) :])  # raises where it is not understood
    shown = CliRunner().invoke(app, [*name.split(), "--help"]).output
    assert "Example: rankfit" in shown
