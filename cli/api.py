"""Running from Python: the same calls that the ``rankfit`` command makes."""

import logging
from pathlib import Path

from rankfit.cli.flower import app_directory, environment, local_superlink, run_app
from rankfit.configs.compose import compose, from_here, is_local
from rankfit.configs.settings import ConfigError, RunSettings

log = logging.getLogger(__name__)


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
    return submit(compose(parts, deployed=superlink is not None), superlink)


def resume(directory: Path, *overrides: str, superlink: str | None = None) -> Path:
    """Continue an interrupted run from its last checkpoint; see :func:`run`."""
    folder = Path(directory).expanduser().resolve()
    config = folder / "config.toml"
    if not config.is_file():
        raise ConfigError(f"{folder} holds no run: there is no config.toml in it")
    place = (f"run.directory={folder.parent}", f"run.name={folder.name}", "run.resume=true")
    return submit(compose((str(config), *overrides, *place)), superlink)


def submit(settings: RunSettings, superlink: str | None) -> Path:
    """Check a run as far as that is possible here, then run it."""
    if superlink is None:
        settings = from_here(settings)  # Flower's processes work elsewhere
    else:
        # Imported here: the catalogue needs torch, and `rankfit presets` should not wait for it.
        from rankfit.strategies.methods import find

        find(settings.method.name)
        _check_paths(settings)
    path = Path(settings.run.directory).expanduser() / settings.run.name
    if superlink is None and (path / "config.toml").exists() and not settings.run.resume:
        raise ConfigError(
            f"{path} holds a run already: give another run.name, or continue it with "
            f"`rankfit resume {path}`"
        )
    if superlink is None:
        # Imported here, as numpy is: `rankfit --help` should not wait for it.
        from rankfit.cli.preflight import check_run

        for note in check_run(settings):
            log.info("%s", note)
        log.info("starting Flower on this machine")
    env = environment(settings.train.threads)
    with app_directory() as app:
        if superlink is not None:
            run_app(app, settings, env, superlink)
        else:
            with local_superlink(env) as own:
                run_app(app, settings, own, None)
    return path


def _check_paths(settings: RunSettings) -> None:
    """Refuse sources that are seen from here, where the run goes to other machines."""
    for key, source in (("model", settings.model.source), ("data", settings.data.source)):
        if source.startswith(("./", "../")):
            raise ConfigError(
                f"{key}.source {source!r} is seen from here, and a SuperLink's machines stand "
                "elsewhere: give a path that is right on them (absolute, or from ~), or a hub id"
            )
        if not source.startswith(("/", "~")) and is_local(source):
            log.warning(
                "%s.source %r is a folder here, but this run goes to other machines: where they "
                "have none of that name it is taken from the hub", key, source
            )  # fmt: skip
