import pytest

from rankfit.estimator.allocator import CachingAllocator, replay
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.memory import Footprint

from .small import MIB

KIB = 1024


def test_sizes_are_rounded_to_512_bytes():
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert allocator.allocated == 512 + 1024
    assert allocator.reserved == 2 * MIB, "both share one small segment"


def test_small_and_large_pools_have_segments_of_their_own():
    allocator = CachingAllocator()
    allocator.allocate(MIB)  # the largest small block
    assert allocator.reserved == 2 * MIB
    allocator.allocate(MIB + 1)
    assert allocator.reserved == 22 * MIB
    allocator.allocate(10 * MIB - 512)  # still from the segment of 20
    assert allocator.reserved == 22 * MIB
    allocator.allocate(11 * MIB - 1)  # a segment of its own, rounded to 2 MiB
    assert allocator.reserved == 34 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken():
    allocator = CachingAllocator()
    large = allocator.allocate(40 * MIB)
    middle = allocator.allocate(20 * MIB)
    assert large and middle
    allocator.release(large)
    allocator.release(middle)
    block = allocator.allocate(18 * MIB)
    assert block and block.address == middle.address
    assert allocator.reserved == 60 * MIB


def test_a_rest_of_one_mib_is_not_split_off_a_large_block():
    allocator = CachingAllocator()
    block = allocator.allocate(21 * MIB)  # segment of 22: the rest is 1 MiB, not above it
    assert block and block.size == 22 * MIB
    assert allocator.allocated == 22 * MIB
    other = allocator.allocate(21 * MIB - 512)  # the rest is above 1 MiB
    assert other and other.size == 21 * MIB - 512


def test_free_neighbours_merge():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(6 * MIB) for _ in range(3)]  # all in one segment of 20
    assert allocator.reserved == 20 * MIB
    for block in (blocks[0], blocks[2], blocks[1]):
        assert block
        allocator.release(block)
    whole = allocator.allocate(20 * MIB)
    assert whole and whole.size == 20 * MIB and allocator.reserved == 20 * MIB


def test_fragments_reserve_more_than_what_lives():
    sizes = [6 * MIB, 6 * MIB, 6 * MIB, 12 * MIB]
    outcome = replay(sizes, [0, 1, 2, -1 - 0, -1 - 2, 3])
    # 6 at the front and 6 + 2 at the end are free, yet 12 do not fit between them.
    assert outcome.reserved == 32 * MIB
    assert outcome.allocated == 18 * MIB


def test_under_a_cap_wholly_free_segments_are_given_back():
    sizes = [30 * MIB, 40 * MIB]
    events = [0, -1, 1]
    assert replay(sizes, events).reserved == 70 * MIB
    capped = replay(sizes, events, cap_bytes=40 * MIB)
    assert capped.survived and capped.reserved == 40 * MIB
    assert not replay(sizes, events, cap_bytes=40 * MIB - 1).survived


def test_a_segment_in_use_is_not_given_back():
    sizes = [4 * MIB, 4 * MIB, 24 * MIB]
    assert not replay(sizes, [0, 1, -1, 2], cap_bytes=40 * MIB).survived


def test_empty_storages_take_nothing():
    assert replay([0], [0, -1]).reserved == 0


def test_bad_figures_are_named():
    with pytest.raises(ValueError, match="allocation 0 has -1 bytes"):
        replay([-1], [0])
    with pytest.raises(ValueError, match="cap_bytes is 0"):
        CachingAllocator(cap_bytes=0)


# DeiT-small under an allocator of 2048 MiB. An earlier prototype of this replay found 93 and 349;
# both agree that reserved memory costs about two thirds of the ranks that live bytes promise.


@pytest.mark.parametrize(("step", "prototype"), [("deit_eager", 93), ("deit_sdpa", 349)])
def test_rank_that_survives_the_replay(step, prototype, request):
    terms = Calibration.cuda("9.0")
    footprint = Footprint((request.getfixturevalue(step),), terms)
    largest = footprint.largest(384, 2048 * MIB + terms.context)
    assert largest == pytest.approx(prototype, abs=2)


def test_the_published_rank_needs_2144_mib_of_allocator(deit_eager):
    footprint = Footprint((deit_eager,), Calibration.cuda("9.0"))

    def survives(mib: int) -> bool:
        return footprint.replays(202, cap_bytes=mib * MIB)[0].survived

    assert survives(2144)
    assert not any(survives(mib) for mib in range(2048, 2144, 2))


def test_allocated_peak_of_the_replay(deit_eager, deit_sdpa):
    for step, expected in ((deit_eager, 2008.22), (deit_sdpa, 1789)):
        outcome = Footprint((step,), Calibration.cuda("9.0")).replays(202)[0]
        assert outcome.allocated / MIB == pytest.approx(expected, rel=0.001)
