"""Reserved memory: a replay of allocation events through a model of torch's CUDA caching allocator.

What decides out-of-memory on a GPU is what the allocator has reserved, not what is alive in it.
The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` with its default settings. Sizes are
rounded to 512 B. Small blocks (≤ 1 MiB) lie in segments of 2 MiB; larger ones below 10 MiB in
segments of 20 MiB; from 10 MiB each has a segment of its own, rounded to 2 MiB. The smallest free
block that is large enough is taken (lowest address first), and split unless the rest is too small;
free neighbours merge. When a segment does not fit under the cap, wholly free segments are given
back and the request is tried again.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from rankfit.estimator.native import Array, native_replay

MIB = 2**20
ROUND = 512
SMALL = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE = 10 * MIB
ROUND_LARGE = 2 * MIB


@dataclass(frozen=True)
class Replay:
    """Outcome of a replay, in bytes.

    Attributes
    ----------
    reserved, allocated : int
        Peaks: segments held, and blocks in use inside them.
    survived : bool
        False if a request could not be met under the cap.
    refused : int
        Least total of reserved bytes that the cap did not allow (0 = all were allowed). Under
        every cap from ``reserved`` to below it, the replay takes the very same course.
    """

    reserved: int
    allocated: int
    survived: bool
    refused: int = 0

    def holds_under(self, cap_bytes: int | None) -> bool:
        """Whether a replay under this cap would take the same course."""
        if cap_bytes is None:
            return self.refused == 0
        return self.reserved <= cap_bytes and (not self.refused or cap_bytes < self.refused)


class _Block:
    """A range of one segment; neighbours are linked."""

    __slots__ = ("address", "free", "next", "prev", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address = address
        self.size = size
        self.small = small
        self.free = True
        self.prev: _Block | None = None
        self.next: _Block | None = None


class CachingAllocator:
    """The allocator's state; ``reserved``, ``allocated`` and their peaks in bytes."""

    def __init__(self, cap_bytes: int | None = None) -> None:
        if cap_bytes is not None and cap_bytes <= 0:
            raise ValueError(f"cap_bytes is {cap_bytes}; expected bytes above 0, or None")
        self.cap_bytes = cap_bytes
        self.reserved = self.allocated = 0
        self.peak_reserved = self.peak_allocated = 0
        #: Least total of reserved bytes that the cap did not allow; 0 = all were allowed.
        self.refused = 0
        self._top = 0
        #: Free blocks of the large (False) and the small (True) pool, by (size, address).
        self._pools: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        self._at: dict[int, _Block] = {}

    def allocate(self, nbytes: int) -> _Block | None:
        """Take a block; None when the cap does not allow it (out of memory)."""
        size = max(ROUND, -(-nbytes // ROUND) * ROUND)
        small = size <= SMALL
        pool = self._pools[small]
        place = bisect_left(pool, (size, -1))
        if place < len(pool):
            block = self._at[pool.pop(place)[1]]
        else:
            segment = self._segment(size)
            if segment is None:
                return None
            block = segment
        rest = block.size - size
        if rest >= ROUND if small else rest > SMALL:
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: _Block) -> None:
        """Give a block back to its pool, merged with its free neighbours."""
        self.allocated -= block.size
        block.free = True
        after = block.next
        if after is not None and after.free:
            self._take(after)
            self._join(block, after)
        before = block.prev
        if before is not None and before.free:
            self._take(before)
            self._join(before, block)
            block = before
        self._put(block)

    def _segment(self, size: int) -> _Block | None:
        """Reserve a new segment, after giving cached ones back if the cap asks for it."""
        if size <= SMALL:
            need = SMALL_SEGMENT
        elif size < MIN_LARGE:
            need = LARGE_SEGMENT
        else:
            need = -(-size // ROUND_LARGE) * ROUND_LARGE
        if not self._fits(need):
            self._give_back()
            if not self._fits(need):
                return None
        block = _Block(self._top, need, size <= SMALL)
        self._at[self._top] = block
        self._top += need
        self.reserved += need
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _fits(self, need: int) -> bool:
        total = self.reserved + need
        if self.cap_bytes is None or total <= self.cap_bytes:
            return True
        self.refused = min(self.refused, total) if self.refused else total
        return False

    def _give_back(self) -> None:
        for pool in self._pools.values():
            whole = [
                entry
                for entry in pool
                if self._at[entry[1]].prev is None and self._at[entry[1]].next is None
            ]
            for entry in whole:
                pool.remove(entry)
                self.reserved -= entry[0]
                del self._at[entry[1]]

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.small)
        rest.prev, rest.next = block, block.next
        if block.next is not None:
            block.next.prev = rest
        block.next = rest
        block.size = size
        self._at[rest.address] = rest
        self._put(rest)

    def _join(self, block: _Block, after: _Block) -> None:
        block.size += after.size
        block.next = after.next
        if after.next is not None:
            after.next.prev = block
        del self._at[after.address]

    def _put(self, block: _Block) -> None:
        insort(self._pools[block.small], (block.size, block.address))

    def _take(self, block: _Block) -> None:
        pool = self._pools[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]


def replay_fast(
    column: Array,
    amount: Array,
    point: Array,
    events: Array,
    resting: int = 0,
    cap_bytes: int | None = None,
) -> Replay:
    """As :func:`replay`, in C where there is a compiler; for its parameters see there.

    Allocation i takes ``amount[i] * point[column[i]]`` bytes; ``resting`` bytes come before all.
    """
    if cap_bytes is not None and cap_bytes <= 0:
        raise ValueError(f"cap_bytes is {cap_bytes}; expected bytes above 0, or None")
    result = native_replay(column, amount, point, events, resting, cap_bytes)
    if result is not None:
        reserved, allocated, refused, survived = result
        return Replay(reserved, allocated, survived, refused)
    sizes = (amount * point[column]).tolist()
    return replay([*sizes, resting], [len(sizes), *events.tolist()], cap_bytes)


def replay(sizes: Sequence[int], events: Sequence[int], cap_bytes: int | None = None) -> Replay:
    """Run allocation events through the allocator.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of each allocation; those of 0 bytes take nothing.
    events : sequence of int
        Index of an allocation as it begins, −1 − index as it ends.
    cap_bytes : int, optional
        Cap on reserved bytes; the replay ends where a request cannot be met.

    Raises
    ------
    ValueError
        For a size below 0.
    """
    allocator = CachingAllocator(cap_bytes)
    blocks: dict[int, _Block] = {}
    for event in events:
        if event < 0:
            block = blocks.pop(-1 - event, None)
            if block is not None:
                allocator.release(block)
            continue
        nbytes = sizes[event]
        if nbytes < 0:
            raise ValueError(f"allocation {event} has {nbytes} bytes; expected 0 or more")
        if nbytes == 0:
            continue
        block = allocator.allocate(nbytes)
        if block is None:
            return _outcome(allocator, survived=False)
        blocks[event] = block
    return _outcome(allocator, survived=True)


def _outcome(allocator: CachingAllocator, *, survived: bool) -> Replay:
    return Replay(allocator.peak_reserved, allocator.peak_allocated, survived, allocator.refused)
