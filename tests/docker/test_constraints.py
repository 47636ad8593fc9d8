"""Packages by content are those by version."""

import re

from tests.conftest import ROOT


def pins(name: str) -> dict[str, str]:
    """By package and version, what follows on its line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        pin, _, rest = line.partition(" ")
        found[pin.lower().replace("_", "-")] = rest
    assert len(found) == len(lines)
    return found


def test_each_pinned_package_has_its_hashes_and_no_other_has() -> None:
    hashed = pins("constraints-hashed.txt")
    assert hashed.keys() == pins("constraints.txt").keys()
    for pin, hashes in hashed.items():
        assert re.fullmatch(r"--hash=sha256:[0-9a-f]{64}( --hash=sha256:[0-9a-f]{64})?", hashes), (
            pin
        )
