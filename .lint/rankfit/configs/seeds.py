"""Every random draw of a run comes from its one seed, by purpose, round and client."""

import hashlib


def derive(seed: int, *parts: str | int) -> int:
    """Return a seed of 40 bits for one purpose: equal parts give equal draws on every machine.

    40 bits leave room for callers that number streams of their own below it.
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:5], "big")
