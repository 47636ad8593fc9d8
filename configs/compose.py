"""Presets: TOML files of settings that are laid over one another into one run config.

A preset sets only what it is about (a task, a split, a method, a fleet); ``include = ["other"]`` at
its top lays it over others. Later presets and ``key=value`` overrides win. One that describes
simulated devices says ``[preset] simulation-only = true``, and a deployment leaves it out.
"""

import difflib
import logging
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rankfit.configs.learning import join_names
from rankfit.configs.settings import (
    ConfigError,
    RunSettings,
    Scalar,
    from_flat,
    known_keys,
    refuse_renamed,
    to_flat,
    unknown_setting,
)

log = logging.getLogger(__name__)

PRESETS = Path(__file__).resolve().parent / "presets"


def compose(parts: Sequence[str], *, deployed: bool = False) -> RunSettings:
    """Lay presets and overrides over the defaults, in order.

    Parameters
    ----------
    parts : Sequence[str]
        Each the name of a preset, the path of a TOML file, or ``table.key=value``.
    deployed : bool
        Leave out presets that describe simulated devices.

    Raises
    ------
    ConfigError
        For an unknown preset or setting, a file that cannot be read, or a bad value.
    """
    flat: dict[str, Scalar] = {}
    for part in parts:
        flat |= parse_override(part) if "=" in part else read_preset(part, deployed=deployed)
    return from_flat(flat)


#: Settings that hold a path; the first three may hold a hub id or a scheme in its place.
_PATHS = (
    "model.source",
    "data.source",
    "lora.start",
    "head.directory",
    "plan.calibration",
    "run.directory",
)
#: Those of folders that a run makes.
_MADE = ("run.directory", "head.directory")
#: Sources that are found by another way than a path.
_SCHEMES = ("builtin:", "package:", "sklearn:")


def is_local(source: str) -> bool:
    """Whether a source is on this machine: written as a path, or a file or folder of that name.

    A bare name that is both a folder here and an id on the hub is the folder.
    """
    return source.startswith(("/", ".", "~")) or (bool(source) and Path(source).exists())


def from_here(settings: RunSettings) -> RunSettings:
    """The same settings with every path made absolute, seen from where the user stands.

    What runs them works elsewhere: Flower in a temporary folder, its nodes on other machines.
    """
    return _with_paths(settings, lambda path: str(Path(path).expanduser().absolute()))


def without_places(settings: RunSettings) -> RunSettings:
    """The same settings with absolute paths cut to ``./NAME``: what may leave this machine.

    ``./`` keeps what reads it from taking the name for a hub id.
    """
    return _with_paths(settings, lambda path: f"./{Path(path).name}")


def _with_paths(settings: RunSettings, change: Callable[[str], str]) -> RunSettings:
    flat = to_flat(settings)
    for key in _PATHS:
        value = str(flat[key])
        scheme, path = ("config:", value[7:]) if value.startswith("config:") else ("", value)
        if not value.startswith(_SCHEMES) and (is_local(path) or (path and key in _MADE)):
            flat[key] = scheme + change(path)
    return from_flat(flat)


def preset_names() -> list[str]:
    """Names of the presets that come with RankFit."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_preset(name: str, *, deployed: bool = False) -> dict[str, Scalar]:
    """Read one preset, by name or path, as dotted keys; {} where a deployment leaves it out.

    Raises
    ------
    ConfigError
        If there is none of that name, or it is not a TOML file of tables.
    """
    file = PRESETS / f"{name}.toml"
    if not file.is_file():
        file = Path(name).expanduser()
        if not (name.endswith(".toml") and file.is_file()):
            raise ConfigError(_unknown_preset(name))
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a TOML file: {error}") from error
    included = _included(tables, file)
    if _simulation_only(tables, file) and deployed:
        log.warning("preset %s describes simulated devices: left out of a deployment", file.stem)
        return {}
    flat: dict[str, Scalar] = {}
    for base in included:
        flat |= read_preset(base, deployed=deployed)
    for table, keys in tables.items():
        if "." in table and not isinstance(keys, Mapping):
            flat[table] = keys  # "table.key" = value, as Flower's own run configs are written
            continue
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{file}: {table!r} is not a table; settings are [table] key = value")
        flat |= {f"{table}.{key}": value for key, value in keys.items()}
    return flat


def parse_override(text: str) -> dict[str, Scalar]:
    """Read ``table.key=value``; the value is TOML, or plain text where the setting is text.

    Raises
    ------
    ConfigError
        For an unknown key, or a value of another type.
    """
    key, _, value = text.partition("=")
    key, value = key.strip(), value.strip()
    known = known_keys()
    refuse_renamed(key)
    if key not in known:
        raise unknown_setting(key)
    if isinstance(known[key], str):
        return {key: _text(value)}
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        expected = type(known[key]).__name__
        raise ConfigError(f"{key}: expected {expected}, got {value!r}") from error
    return {key: parsed}


def _text(value: str) -> str:
    """The text of an override: bare, in double quotes, or a TOML list of names."""
    if len(value) >= 2 and value[0] == value[-1] == '"' and '"' not in value[1:-1]:
        return value[1:-1]
    if value.startswith("[") and value.endswith("]"):
        try:
            return join_names(tomllib.loads(f"value = {value}")["value"])
        except tomllib.TOMLDecodeError:
            pass  # text that happens to be in brackets
    return value


def _included(tables: dict[str, object], file: Path) -> list[str]:
    """Take the names of the presets below this one out of its tables."""
    names = tables.pop("include", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{file}: include is {names!r}; expected a list of presets")
    if file.stem in names:
        raise ConfigError(f"{file} includes itself")
    return names


def _simulation_only(tables: dict[str, object], file: Path) -> bool:
    """Take what a preset says of itself out of its tables: whether it is of simulated devices."""
    own = tables.pop("preset", {})
    if own not in ({}, {"simulation-only": True}, {"simulation-only": False}):
        raise ConfigError(f"{file}: [preset] is {own!r}; it has simulation-only = true or false")
    return own == {"simulation-only": True}


def _unknown_preset(name: str) -> str:
    near = difflib.get_close_matches(name, preset_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"unknown preset {name!r}{hint} (presets: {', '.join(preset_names())}; or the path of a "
        ".toml file)"
    )
