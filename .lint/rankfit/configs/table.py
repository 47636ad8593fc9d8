"""What every table of the settings is made of: its base class, number types, and lists as text."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


def split_list(text: str) -> tuple[str, ...]:
    """Split comma-separated text; blanks around items and empty items are dropped."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def split_numbers(text: str, key: str) -> tuple[float, ...]:
    """Split comma-separated numbers.

    Raises
    ------
    ValueError
        If an item is not a number.
    """
    try:
        return tuple(float(item) for item in split_list(text))
    except ValueError as error:
        raise ValueError(f"{key}: expected comma-separated numbers, got {text!r}") from error


def kebab(name: str) -> str:
    """Write a field's name as the run config does."""
    return name.replace("_", "-")


class Table(BaseModel):
    """One table of the run config; frozen, unknown keys refused, keys in kebab-case."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=kebab, populate_by_name=True
    )


PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
