"""What is made from the declared settings: reference, JSON schema, commented TOML, Flower's table.

Run ``python -m rankfit.configs.flower_defaults`` after a change of settings: it writes
``[tool.flwr.app.config]`` of pyproject.toml, because Flower refuses a key that is not listed there,
and docs/settings.md. A test compares both.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from rankfit.configs.learning import Table, kebab
from rankfit.configs.settings import RunSettings, Scalar, known_keys, to_flat

_HEADER = "[tool.flwr.app.config]\n"
#: Units that the end of a name says.
_UNITS = {"-seconds": "s", "-mib": "MiB", "-mbps": "Mbit/s"}
_TYPES: dict[object, str] = {
    str: "text", bool: "true or false", int: "whole number", float: "number",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One declared setting.

    Attributes
    ----------
    key : str
        As in a run config: ``train.batch-size``.
    type : str
        ``text``, ``true or false``, ``whole number`` or ``number``.
    choices : tuple of str
        Of a text that is one of a few; () = any.
    range : str
        Bounds of a number: ``≥ 1``; "" = none.
    unit : str
        "" = none.
    """

    key: str
    type: str
    default: Scalar
    choices: tuple[str, ...]
    range: str
    unit: str
    description: str

    @classmethod
    def of(cls, table: str, name: str, field: FieldInfo) -> "Setting":
        """Read a field of a table's model."""
        key = f"{table}.{kebab(name)}"
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        extra = field.json_schema_extra
        unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
        named = [short for end, short in _UNITS.items() if key.endswith(end)]
        return cls(
            key,
            "text" if choices else _TYPES[field.annotation],
            field.default,
            choices,
            ", ".join(_bounds(field)),
            unit or (named[0] if named else ""),
            field.description or "",
        )

    def form(self) -> str:
        """What may be written: the choices or the type, then range and unit."""
        what = " | ".join(self.choices) or f"{self.type} {self.range}".strip()
        return f"{what}, in {self.unit}" if self.unit else what


def tables() -> Iterator[tuple[str, type[Table]]]:
    """Names and models of all tables, in their order."""
    for name, field in RunSettings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Table):
            yield name, field.annotation


def declared() -> list[Setting]:
    """Every setting, in the order of the tables."""
    return [
        Setting.of(table, name, field)
        for table, model in tables()
        for name, field in model.model_fields.items()
    ]


def reference() -> str:
    """Return the page docs/settings.md."""
    text = (
        "# Settings\n\nEvery setting of a run, made from `configs/` by "
        "`python -m rankfit.configs.flower_defaults`. A preset or a file of your own is TOML with\n"
        "these tables; on the command line it is `train.batch-size=16`. `rankfit settings PRESET` "
        "prints them with their values, as a file that `rankfit run`\nreads back; "
        "`rankfit settings --schema` prints a JSON schema for editors.\n\n"
        "Defaults are those of a deployment. `fleet.*` and `simulation.*` describe simulated "
        "clients and count in a simulation alone.\n"
    )
    known = declared()
    for table, model in tables():
        text += f"\n## {table}\n\n{_paragraph(model)}\n\n"
        text += "| setting | value | unit | default | |\n|---|---|---|---|---|\n"
        for own in known:
            if own.key.startswith(f"{table}."):
                choices = " \\| ".join(f"`{choice}`" for choice in own.choices)
                value = " ".join(filter(None, (choices or own.type, own.range)))
                cells = (f"`{own.key}`", value, own.unit, f"`{_toml(own.default)}`")
                text += f"| {' | '.join(cells)} | {own.description} |\n"
    return text


def schema() -> dict[str, Any]:
    """JSON schema of a TOML file of settings, for editors that check and complete."""
    found = RunSettings.model_json_schema(by_alias=True)
    found["title"] = "RankFit run settings"
    found["properties"]["include"] = {
        "type": "array", "items": {"type": "string"}, "description": "Presets below this file.",
    }  # fmt: skip
    about = "It describes simulated devices: a deployment leaves it out."
    found["properties"]["preset"] = {
        "type": "object", "additionalProperties": False,
        "properties": {"simulation-only": {"type": "boolean", "description": about}},
    }  # fmt: skip
    return found


def commented(settings: RunSettings) -> str:
    """Write settings as TOML that :func:`~rankfit.configs.compose.read_preset` reads back."""
    values = to_flat(settings)
    text = ""
    for own in declared():
        says = f"{own.description} ({own.form()}; default {_toml(own.default)})"
        text += "".join(f"# {line}\n" for line in textwrap.wrap(says, 98, break_on_hyphens=False))
        text += f"{own.key} = {_toml(values[own.key])}\n\n"
    return text.rstrip("\n") + "\n"


def flower_table() -> str:
    """Return the body of ``[tool.flwr.app.config]``: every key with its default."""
    return tomli_w.dumps(known_keys())


def main(root: Path) -> None:
    """Write Flower's table and the reference page of a checkout."""
    pyproject = root / "pyproject.toml"
    text = pyproject.read_text(encoding="utf-8")
    before, _, rest = text.partition(_HEADER)
    _, _, after = rest.partition("\n[")
    pyproject.write_text(f"{before}{_HEADER}{flower_table()}\n[{after}", encoding="utf-8")
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "settings.md").write_text(reference(), encoding="utf-8")


def _bounds(field: FieldInfo) -> Iterator[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for bound in field.metadata:
        for name, sign in signs.items():
            if (value := getattr(bound, name, None)) is not None:
                yield f"{sign} {value}"


def _toml(value: Scalar) -> str:
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def _paragraph(model: type[Table]) -> str:
    return " ".join((model.__doc__ or "").replace("``", "`").split())


if __name__ == "__main__":
    main(Path.cwd())
