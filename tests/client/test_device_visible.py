"""``CUDA_VISIBLE_DEVICES``: CUDA's documented rules, and PyTorch's reading of them as oracle."""

import os
from collections.abc import Sequence
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import cuda

from rankfit.client.nvml import visible_devices

UUIDS = ["GPU-aaaa1", "GPU-aab22", "GPU-b3333", "GPU-b4444"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (0, 1, 2, 3)),
        ("", ()),
        ("-1", ()),
        ("2,1", (2, 1)),
        ("0,2,-1,1", (0, 2)),  # the CUDA guide's own example
        ("0,9,1", (0,)),
        (" 1 , 2", (1, 2)),
        ("1gpu2,2ampere", (1, 2)),
        ("0,1,0", ()),
        ("all", ()),
        ("0,", (0,)),
        ("GPU-b4", (3,)),
        ("GPU-b4,GPU-aaaa1", (3, 0)),
        ("GPU-aa", ()),  # ambiguous
        ("GPU-b4,GPU-aa,GPU-b3", (3,)),
        ("GPU-b4,0", (3,)),
        ("0,GPU-b4", (0,)),
        ("GPU-b4,GPU-b44", ()),  # one GPU, named twice
        ("MIG-1,MIG-2", ("MIG-1", "MIG-2")),
        ("MIG-1,GPU-b4", ("MIG-1",)),
        ("MIG-1,MIG-1", ()),
    ],
)
def test_rules(text: str | None, expected: tuple[int | str, ...]) -> None:
    assert visible_devices(text, UUIDS) == expected


def by_torch(text: str, uuids: Sequence[str]) -> tuple[int | str, ...]:
    """PyTorch's parser, trimmed to existing indices as its device count does."""
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": text}):
        found = cuda._parse_visible_devices()
    if found and isinstance(found[0], str):
        if found[0].startswith("MIG-"):
            return tuple(found)
        return tuple(cuda._transform_uuid_to_ordinals(found, list(uuids)))
    known = [isinstance(index, int) and index < len(uuids) for index in found]
    return tuple(found[: known.index(False)] if False in known else found)


indices = st.integers(-2, 6).map(str)
words = st.sampled_from(["", "all", "none", "1x", "2gpu", "+1", "-0", "GPU", "0x1", "1.5"])
prefixes = st.builds(lambda uuid, end: uuid[:end], st.sampled_from(UUIDS), st.integers(4, 9))
slices = st.sampled_from(["MIG-1", "MIG-2", "MIG-"])


@given(st.lists(indices | words | prefixes | slices, max_size=5).map(",".join))
def test_agrees_with_torch(text: str) -> None:
    assert visible_devices(text, UUIDS) == by_torch(text, UUIDS)


@given(st.text(max_size=30) | st.none(), st.integers(0, 4))
def test_any_text_gives_distinct_existing_devices(text: str | None, count: int) -> None:
    found = visible_devices(text, UUIDS[:count])
    assert len(set(found)) == len(found)
    assert all(
        item in range(count) if isinstance(item, int) else item.startswith("MIG-") for item in found
    )


@given(st.permutations(range(4)), st.integers(1, 4))
def test_order_is_kept(order: list[int], length: int) -> None:
    chosen = tuple(order[:length])
    assert visible_devices(",".join(map(str, chosen)), UUIDS) == chosen
    assert visible_devices(",".join(UUIDS[index] for index in chosen), UUIDS) == chosen
