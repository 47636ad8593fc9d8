"""Running from Python: the same calls that the ``rankfit`` command makes."""

from pathlib import Path

from rankfit.cli.flower import app_directory, environment, local_superlink, run_app
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError, RunSettings


def run(*parts: str, superlink: str | None = None) -> Path:
    """Run a federated fine-tune through Flower and wait for its end.

    Parameters
    ----------
    *parts : str
        Presets and ``table.key=value`` settings, as for ``rankfit run``.
    superlink : str, optional
        Name of a SuperLink connection in Flower's config; None = simulate on this machine.

    Returns
    -------
    Path
        The run directory.

    Raises
    ------
    ConfigError
        For a setting, preset or method that cannot be used; before anything is started.
    FlowerError
        If Flower could not be started or the run failed.

    Examples
    --------
    >>> rankfit.run("quickstart", "run.rounds=5", "run.name=five")
    """
    return submit(compose(parts), superlink)


def resume(directory: Path, *overrides: str, superlink: str | None = None) -> Path:
    """Continue an interrupted run from its last checkpoint; see :func:`run`."""
    folder = Path(directory).expanduser().resolve()
    config = folder / "config.toml"
    if not config.is_file():
        raise ConfigError(f"{folder} holds no run: there is no config.toml in it")
    place = (f"run.directory={folder.parent}", f"run.name={folder.name}", "run.resume=true")
    return submit(compose((str(config), *overrides, *place)), superlink)


def submit(settings: RunSettings, superlink: str | None) -> Path:
    """Check settings as far as it costs nothing, then run them."""
    # Imported here: the catalogue needs torch, and `rankfit presets` should not wait for it.
    from rankfit.strategies.catalogue import find

    find(settings.method.name)
    directory = Path(settings.run.directory).expanduser()
    if superlink is None:
        # Flower's processes work elsewhere; on a SuperLink's machine the path is that machine's.
        directory = directory.resolve()
        run_table = settings.run.model_copy(update={"directory": str(directory)})
        settings = settings.model_copy(update={"run": run_table})
    path = directory / settings.run.name
    if superlink is None and (path / "config.toml").exists() and not settings.run.resume:
        raise ConfigError(
            f"{path} holds a run already: give another run.name, or continue it with "
            f"`rankfit resume {path}`"
        )
    env = environment(settings.train.threads)
    with app_directory() as app:
        if superlink is not None:
            run_app(app, settings, env, superlink)
        else:
            with local_superlink(env) as own:
                run_app(app, settings, own, None)
    return path
