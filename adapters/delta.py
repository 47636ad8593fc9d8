"""Delta encoding by content hash: what the other side has already is not sent again. No torch."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from rankfit.adapters import names
from rankfit.configs.faults import Faulty

Arrays = dict[str, NDArray[np.generic]]
#: By array, a hash of each of its directions.
ContentHashes = Mapping[str, Sequence[bytes]]
#: By array, where each of its directions is among those that are stored; −1 = it is sent.
Places = dict[str, list[int]]


class UnknownTensor(Faulty, LookupError):
    """What was left out is not stored (any more)."""

    code = "message-lost"


def content_hashes(arrays: Mapping[str, NDArray[np.generic]]) -> ContentHashes:
    """Hashes of everything in a message, as it was encoded."""
    return {
        name: tuple(
            blake2b(part.tobytes(), digest_size=12).digest() for part in _parts(name, array)
        )
        for name, array in arrays.items()
    }


def encode_delta(
    arrays: Mapping[str, NDArray[np.generic]], own: ContentHashes, stored: ContentHashes
) -> tuple[Arrays, Places]:
    """The arrays without the directions that are stored, and where those are.

    Parameters
    ----------
    own : ContentHashes
        Of the arrays.
    stored : ContentHashes
        Of what the other side was sent last.
    """
    sent: Arrays = {}
    places: Places = {}
    for name, array in arrays.items():
        known = {print_: place for place, print_ in enumerate(stored.get(name, ()))}
        where = [known.get(print_, -1) for print_ in own[name]]
        if max(where, default=-1) < 0:
            sent[name] = array
            continue
        places[name] = where
        new = [index for index, place in enumerate(where) if place < 0]
        if new:
            sent[name] = np.ascontiguousarray(np.take(array, new, axis=_axis(name)))
    return sent, places


def apply_delta(
    sent: Mapping[str, NDArray[np.generic]],
    places: Mapping[str, Sequence[int]],
    stored: Mapping[str, NDArray[np.generic]],
) -> Arrays:
    """Inverse of :func:`encode_delta`, from the arrays that are stored.

    Raises
    ------
    UnknownTensor
        If they are not.
    """
    arrays: Arrays = {name: array for name, array in sent.items() if name not in places}
    for name, where in places.items():
        old = _parts(name, stored[name]) if name in stored else []
        if max(where) >= len(old):
            raise UnknownTensor(
                f"{name!r} was left out of the message because this client was sent it before, but "
                "it is not here: the SuperNode lost its state; the next message will be whole"
            )
        new = iter(_parts(name, sent[name]) if name in sent else [])
        parts = [old[place] if place >= 0 else next(new) for place in where]
        axis = _axis(name)
        arrays[name] = parts[0] if axis is None else np.ascontiguousarray(np.stack(parts, axis))
    return arrays


def _axis(name: str) -> int | None:
    """Axis along which an array's directions lie; None = it is one piece."""
    plain, _, tag = name.partition("|")
    kind = names.parse(plain)[1]
    if kind == "head":
        return None
    return 0 if kind == "a" or tag.endswith("scale") else 1


def _parts(name: str, array: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    axis = _axis(name)
    return [array] if axis is None else list(np.moveaxis(array, axis, 0))
