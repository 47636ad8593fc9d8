"""Presets: TOML files of settings that are laid over one another into one run config.

A preset sets only what it is about (a task, a split, a method, a fleet); ``include = ["other"]`` at
its top lays it over others. Later presets and ``key=value`` overrides win.
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankfit.configs.settings import ConfigError, RunSettings, Scalar, from_flat, known_keys

PRESETS = Path(__file__).resolve().parent / "presets"


def compose(parts: Sequence[str]) -> RunSettings:
    """Lay presets and overrides over the defaults, in order.

    Parameters
    ----------
    parts : Sequence[str]
        Each the name of a preset, the path of a TOML file, or ``table.key=value``.

    Raises
    ------
    ConfigError
        For an unknown preset or setting, a file that cannot be read, or a bad value.
    """
    flat: dict[str, Scalar] = {}
    for part in parts:
        flat |= parse_override(part) if "=" in part else read_preset(part)
    return from_flat(flat)


def preset_names() -> list[str]:
    """Names of the presets that come with RankFit."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_preset(name: str) -> dict[str, Scalar]:
    """Read one preset, by name or path, as dotted keys.

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
    flat: dict[str, Scalar] = {}
    for base in _included(tables, file):
        flat |= read_preset(base)
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
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown setting {key!r}{hint}")
    quoted = len(value) >= 2 and value[0] == value[-1] == '"'
    if isinstance(known[key], str):
        return {key: value[1:-1] if quoted else value}
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        expected = type(known[key]).__name__
        raise ConfigError(f"{key}: expected {expected}, got {value!r}") from error
    return {key: parsed}


def _included(tables: dict[str, object], file: Path) -> list[str]:
    """Take the names of the presets below this one out of its tables."""
    names = tables.pop("include", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{file}: include is {names!r}; expected a list of presets")
    if file.stem in names:
        raise ConfigError(f"{file} includes itself")
    return names


def _unknown_preset(name: str) -> str:
    near = difflib.get_close_matches(name, preset_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"unknown preset {name!r}{hint} (presets: {', '.join(preset_names())}; or the path of a "
        ".toml file)"
    )
