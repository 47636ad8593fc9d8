"""The catalogue of methods: every module here declares one ``METHOD``."""

import difflib
import importlib
import pkgutil
from functools import cache

from rankfit.configs.settings import ConfigError
from rankfit.strategies.method import Method


@cache
def methods() -> dict[str, Method]:
    """All methods by name, found in this folder."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        method: Method = importlib.import_module(f"{__name__}.{module.name}").METHOD
        found[method.name] = method
    return found


def find(name: str) -> Method:
    """Look a method up.

    Raises
    ------
    ConfigError
        If there is none of that name; the message lists all.
    """
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown method {name!r}{hint} (method.name: {', '.join(sorted(known))})"
        )
    return known[name]
