"""Records that cannot be used: the run is refused, or they are counted and left out.

Every record goes once through what training does with it: a label is a class or a number, and the
input is read, decoded, rendered and encoded. That costs one pass over the data (about 0.1 ms a
text, a few ms a picture); what it found is kept in a cache, so that the processes of a simulation
and later runs on unchanged files do not repeat it.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rankfit.configs.settings import RunSettings
from rankfit.tasks.data import is_number, wrong_label
from rankfit.tasks.prompts import as_passage
from rankfit.tasks.readers import DataError, Fault, Raw, Reading, RecordError, Rows

log = logging.getLogger(__name__)

#: Encodes inputs as training would; an exception says that one of them cannot be.
Encode = Callable[[Sequence[Any], Reading | None], object]

#: Inputs that are encoded together, as long as none is wrong.
_TOGETHER = 64
#: What decides how an input is encoded, beside the data.
_PACKAGES = ("transformers", "tokenizers", "pillow", "datasets")
_KEPT_FILES = 200


def screen(raw: Raw, settings: RunSettings, encode: Encode | None = None, model: str = "") -> Raw:
    """Leave out what cannot be used, if ``data.bad-records`` is ``skip``.

    Parameters
    ----------
    encode
        What training does with inputs (None = they are only looked at).
    model
        Fingerprint of what encodes them; "" = what is found is not kept.

    Raises
    ------
    RecordError
        For the first record that cannot be used, if the setting is ``refuse``.
    """
    skip = settings.data.bad_records == "skip"
    place = _cache(raw, settings, model) if encode is not None and model else None
    wrong = _load(place)
    if wrong is None:
        wrong = _search(raw, settings, encode, stop=not skip)
        if not wrong or skip:
            _save(place, wrong)
    if wrong and not skip:
        row, (what, fault) = min(wrong.items())
        raise RecordError(raw.origin, row, what, fault)
    report_skipped(raw.origin, len(wrong), "content that cannot be used")
    if not wrong:
        return raw
    kept = [row for row in range(len(raw.labels)) if row not in wrong]
    if not kept:
        row, (what, fault) = min(wrong.items())
        raise DataError(
            f"data {raw.origin}: the set is empty: none of {len(raw.labels)} records can be used; "
            f"row {row} {what}"
        )
    return select(raw, kept)


def select(raw: Raw, kept: Sequence[int]) -> Raw:
    """Some rows of what was read."""
    groups = None if raw.groups is None else [raw.groups[row] for row in kept]
    labels = [raw.labels[row] for row in kept]
    inputs = Rows(raw.inputs, np.array(kept, dtype=np.int64))
    return replace(raw, inputs=inputs, labels=labels, groups=groups)


def report_skipped(origin: str, count: int, what: str) -> None:
    """Say how many records were left out."""
    if count:
        log.warning("data %s: %d records with %s are left out", origin, count, what)


Wrong = dict[int, tuple[str, Fault]]


def _search(raw: Raw, settings: RunSettings, encode: Encode | None, *, stop: bool) -> Wrong:
    """Rows that cannot be used, and why; with ``stop``, the first."""
    wrong: Wrong = {}
    rows = iter(range(len(raw.labels)))
    while part := list(islice(rows, _TOGETHER)):
        inputs: dict[int, Any] = {}
        for row in part:
            label = _wrong_label(raw.labels[row], settings)
            if label:
                wrong[row] = (label, "label")
                continue
            try:
                inputs[row] = raw.inputs[row]
                unusable = _wrong_input(inputs[row], raw, settings)
            except Exception as error:  # noqa: BLE001 - whatever a decoder raises for a broken file
                unusable = f"cannot be read: {_line(error)}"
            if unusable:
                wrong[row] = (unusable, "input")
                inputs.pop(row, None)
        if encode is not None and inputs:
            wrong |= _not_encoded(inputs, encode, raw.reading)
        if wrong and stop:
            break
    return wrong


def _not_encoded(inputs: dict[int, Any], encode: Encode, reading: Reading | None) -> Wrong:
    """Rows that cannot be encoded: tried together, and one by one where that fails."""
    try:
        encode(list(inputs.values()), reading)
        return {}
    except Exception:  # noqa: BLE001 - the one that is at fault is looked for below
        pass
    wrong: Wrong = {}
    for row, value in inputs.items():
        try:
            encode([value], reading)
        except Exception as error:  # noqa: BLE001 - training would fail by it, whatever it is
            what = str(error) if isinstance(error, DataError) else (
                f"cannot be encoded: {_line(error)}"
            )  # fmt: skip
            wrong[row] = (what, "encoding")
    return wrong


def _line(error: Exception) -> str:
    """First line of an error."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def _wrong_label(label: Any, settings: RunSettings) -> str:
    if settings.task.kind == "causal-lm":
        return ""  # it only groups records
    if settings.task.problem == "classification":
        return wrong_label(label)
    return "" if is_number(label) else f"has label {label!r}, expected a number"


def _wrong_input(value: Any, raw: Raw, settings: RunSettings) -> str:
    if settings.task.kind == "image-classification":
        return "holds no image" if value is None else ""
    if settings.task.kind == "causal-lm":
        try:
            as_passage(value, settings, raw.reading)
        except ValueError as error:
            return str(error)
        return ""
    texts = value if isinstance(value, tuple) else (value,)
    bad = next((part for part in texts if not isinstance(part, str)), "")
    return "" if isinstance(bad, str) else f"holds {bad!r}, expected text"


# What was found, kept between processes: numbers of rows and words, nothing of the records.


def _cache(raw: Raw, settings: RunSettings, model: str) -> Path | None:
    """File that holds what was found in the same content by the same means; None = none can."""
    content = raw.fingerprint()
    if not content:
        return None
    means = {
        "content": content,
        "model": model,
        "task": settings.task.model_dump(mode="json"),
        "data": settings.data.model_dump(mode="json", exclude={"source"}),
        "packages": [version(name) for name in _PACKAGES],
        "reading": None if raw.reading is None else dict(raw.reading.columns),
    }
    name = hashlib.sha256(json.dumps(means, sort_keys=True).encode()).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rankfit"
    folder = base / "screened"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for own in (base, folder):
            found = own.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                return None
        os.chmod(folder, 0o700)
        return folder / f"{name}.json"
    except OSError:
        return None


def _load(place: Path | None) -> Wrong | None:
    try:
        found = json.loads(place.read_text("utf-8")) if place is not None else None
        if not isinstance(found, dict) or not set(found.values()) <= set(get_args(Fault)):
            return None
        return {int(row): ("was found unusable before", fault) for row, fault in found.items()}
    except (OSError, ValueError):
        return None


def _save(place: Path | None, wrong: Wrong) -> None:
    if place is None:
        return
    new = place.with_suffix(f".{os.getpid()}")
    try:
        new.write_text(json.dumps({row: fault for row, (_, fault) in wrong.items()}), "utf-8")
        new.replace(place)
        files = sorted(place.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in files[:-_KEPT_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.info("what is unusable in the data cannot be kept in %s: %s", place.parent, error)
