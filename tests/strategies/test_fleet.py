"""The order in which replies are folded."""

from collections.abc import Sequence
from typing import Any

import pytest

from rankfit.strategies.fleet import in_order


def order(arrived: Sequence[int], limit: int) -> list[int]:
    replies: Any = [(position, None) for position in arrived]
    return [position for position, _ in in_order(replies, limit)]


@pytest.mark.parametrize("arrived", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_replies_are_folded_in_the_order_of_their_messages(arrived: list[int]) -> None:
    assert order(arrived, 4) == [0, 1, 2, 3]


def test_a_client_that_never_answers_is_left_out() -> None:
    assert order([3, 1, 2], 4) == [1, 2, 3]


def test_no_more_than_the_limit_wait_for_a_late_client() -> None:
    assert order([5, 4, 3, 2, 1, 0], 2) == [3, 4, 5, 2, 1, 0]
    waiting: list[int] = []

    def arriving() -> Any:
        for position in [9, 8, 7, 6, 5, 0, 4, 1, 2, 3]:
            waiting.append(position)
            yield position, None

    for position, _ in in_order(arriving(), 3):
        assert len(waiting) <= 4
        waiting.remove(position)
    assert waiting == []
