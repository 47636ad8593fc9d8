"""Writes ``[tool.flwr.app.config]`` of pyproject.toml from the settings and the quickstart preset.

Flower refuses a run config key that is not listed there. Run ``python -m
rankfit.configs.flower_defaults`` after a change of settings; a test compares the two.
"""

import sys
from pathlib import Path

import tomli_w

from rankfit.configs.compose import compose
from rankfit.configs.settings import to_flat

_HEADER = "[tool.flwr.app.config]\n"


def table() -> str:
    """The body of the table: every key, with the quickstart's value."""
    return tomli_w.dumps(dict(to_flat(compose(["quickstart"]))))


def main(pyproject: Path) -> None:
    """Replace the table in a pyproject.toml."""
    text = pyproject.read_text(encoding="utf-8")
    before, _, rest = text.partition(_HEADER)
    _, _, after = rest.partition("\n[")
    pyproject.write_text(f"{before}{_HEADER}{table()}\n[{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("pyproject.toml"))
