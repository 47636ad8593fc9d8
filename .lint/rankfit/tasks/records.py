"""Records that cannot be used: the run is refused, or they are counted and left out."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from rankfit.configs.settings import RunSettings
from rankfit.tasks.prompts import as_passage
from rankfit.tasks.raw import DataError, Raw, Rows

log = logging.getLogger(__name__)

#: Says what is wrong with an input; "" = nothing.
Check = Callable[[Any], str]


def screen(raw: Raw, settings: RunSettings) -> Raw:
    """Leave out what cannot be used, if ``data.bad-records`` is ``skip``.

    Images are opened for it then, once; otherwise one that cannot be read is found when it is
    first needed.

    Raises
    ------
    DataError
        If a record cannot be used and the setting is ``refuse``, with its row.
    """
    skip = settings.data.bad_records == "skip"
    check = _check(settings)
    kept = []
    for row in range(len(raw.labels)):
        wrong = _wrong_label(raw.labels[row], settings) or _wrong_input(raw.inputs, row, check)
        if not wrong:
            kept.append(row)
        elif not skip:
            raise DataError(
                f"data {raw.origin}: row {row} {wrong} (data.bad-records=skip leaves such rows out)"
            )
    report_skipped(raw.origin, len(raw.labels) - len(kept), "content that cannot be used")
    if len(kept) == len(raw.labels):
        return raw
    rows = np.array(kept, dtype=np.int64)
    groups = None if raw.groups is None else [raw.groups[row] for row in kept]
    labels = [raw.labels[row] for row in kept]
    return replace(raw, inputs=Rows(raw.inputs, rows), labels=labels, groups=groups)


def report_skipped(origin: str, count: int, what: str) -> None:
    """Say how many records were left out."""
    if count:
        log.warning("data %s: %d records with %s are left out", origin, count, what)


def _check(settings: RunSettings) -> Check | None:
    kind = settings.task.kind
    if kind == "causal-lm":
        return lambda record: _wrong_record(record, settings)
    if kind == "text-classification":
        return _wrong_text
    return _wrong_image if settings.data.bad_records == "skip" else None


def _wrong_input(inputs: Sequence[Any], row: int, check: Check | None) -> str:
    if check is None:
        return ""
    try:
        return check(inputs[row])
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        return f"cannot be read: {error}"


def _wrong_label(label: Any, settings: RunSettings) -> str:
    if settings.task.problem == "classification":
        missing = label is None or (isinstance(label, float) and math.isnan(label))
        return "has no label" if missing and settings.data.bad_records == "skip" else ""
    if isinstance(label, Real) and math.isfinite(float(label)):
        return ""
    return f"has label {label!r}, expected a number"


def _wrong_text(text: Any) -> str:
    texts = text if isinstance(text, tuple) else (text,)
    bad = next((part for part in texts if not isinstance(part, str)), "")
    return "" if isinstance(bad, str) else f"holds {bad!r}, expected text"


def _wrong_image(image: Any) -> str:
    return "holds no image" if image is None else ""


def _wrong_record(record: Any, settings: RunSettings) -> str:
    try:
        as_passage(record, settings)
    except ValueError as error:
        return str(error)
    return ""
