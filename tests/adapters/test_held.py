"""What the other side holds is left out of a message, and put back there."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.delta import UnknownTensor, apply_delta, content_hashes, encode_delta
from rankfit.adapters.wire import WireType, encode

WIRES: list[WireType] = ["float32", "float16", "bfloat16", "int8"]


def adapter(rank: int, seed: int) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    factors = {
        "one": Factors(
            torch.randn(7, rank, generator=random), torch.randn(rank, 5, generator=random)
        ),
        "two": Factors(torch.zeros(4, rank), torch.randn(rank, 6, generator=random)),
    }
    return Adapter(factors, 1.0, {"head.weight": torch.randn(3, 4, generator=random)})


def mixed(old: Adapter, new: Adapter, takes: list[bool]) -> Adapter:
    """The new adapter with some of the old one's directions in it."""
    factors = {}
    for module, own in new.factors.items():
        b, a, before = own.b.clone(), own.a.clone(), old.factors[module]
        for index, take in enumerate(takes[: min(own.rank, before.rank)]):
            if take:
                b[:, index], a[-1 - index] = before.b[:, -1 - index], before.a[index]
        factors[module] = Factors(b, a)
    return Adapter(factors, 1.0, old.head if takes[0] else new.head)


@given(
    wire=st.sampled_from(WIRES),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    takes=st.lists(st.booleans(), min_size=1, max_size=6),
)
def test_what_is_filled_in_is_what_would_have_been_sent(
    wire: WireType, ranks: tuple[int, int], takes: list[bool]
) -> None:
    before, fresh = adapter(ranks[0], 1), adapter(ranks[1], 2)
    held = encode(before.state_dict(), wire)
    whole = encode(mixed(before, fresh, takes).state_dict(), wire)
    sent, places = encode_delta(whole, content_hashes(whole), content_hashes(held))
    found = apply_delta(sent, places, held)
    assert found.keys() == whole.keys()
    for name, array in whole.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    if any(takes[: min(ranks)]):
        assert sum(a.nbytes for a in sent.values()) < sum(a.nbytes for a in whole.values())


def test_all_held_and_none_held() -> None:
    whole = encode(adapter(3, 1).state_dict(), "float32")
    sent, places = encode_delta(whole, content_hashes(whole), content_hashes(whole))
    assert sent == {} and apply_delta(sent, places, whole).keys() == whole.keys()
    sent, places = encode_delta(whole, content_hashes(whole), {})
    assert sent.keys() == whole.keys() and places == {}


def test_what_is_not_held_any_more_is_told() -> None:
    whole = encode(adapter(3, 1).state_dict(), "float32")
    sent, places = encode_delta(whole, content_hashes(whole), content_hashes(whole))
    with pytest.raises(UnknownTensor, match="the next message will be whole"):
        apply_delta(sent, places, {})
