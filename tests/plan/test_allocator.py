"""The caching allocator's documented rules, one by one, and what always holds whatever is asked of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katei.plan.allocator import MIB, CachingAllocator, DeviceFull, rounded


def after(*requests: int) -> CachingAllocator:
    """Allocations of these sizes, named 0, 1, 2 …; a negative one frees the tensor of that place, from the end."""
    allocator = CachingAllocator()
    for name, size in enumerate(requests):
        allocator.allocate(name, size)
    return allocator


@pytest.mark.parametrize(("size", "taken"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_rounded_up_to_512_bytes(size: int, taken: int) -> None:
    assert rounded(size) == taken
    assert after(size).allocated == taken


@pytest.mark.parametrize(
    ("size", "reserved"),
    [(1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (11 * MIB, 12), (23 * MIB + 1, 24)],
)
def test_a_first_request_takes_a_segment_of_its_kind(size: int, reserved: int) -> None:
    assert after(size).reserved == reserved * MIB


def test_small_requests_share_a_segment_of_two_mebibytes() -> None:
    assert after(*[512] * 4096).reserved == 2 * MIB
    assert after(*[512] * 4097).reserved == 4 * MIB


def test_large_requests_share_twenty_mebibytes_until_one_does_not_fit() -> None:
    assert after(*[5 * MIB] * 4).reserved == 20 * MIB
    assert after(*[5 * MIB] * 5).reserved == 40 * MIB


def test_a_large_block_is_cut_only_if_more_than_a_mebibyte_is_left() -> None:
    allocator = after(19 * MIB)  # its own segment of 20: the last one is not cut off, it belongs to the block
    assert allocator.reserved == 20 * MIB
    assert allocator.allocated == 20 * MIB


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    allocator = after(30 * MIB, 12 * MIB)
    allocator.free(0)
    allocator.free(1)
    allocator.allocate(2, 11 * MIB)
    allocator.allocate(3, 30 * MIB)
    assert allocator.reserved == 42 * MIB


def test_freed_neighbours_join() -> None:
    allocator = after(6 * MIB, 6 * MIB, 6 * MIB)
    for name in (0, 2, 1):
        allocator.free(name)
    allocator.allocate(9, 9 * MIB)
    allocator.allocate(10, 9 * MIB)
    assert allocator.reserved == 20 * MIB


def test_unused_segments_are_given_back_only_when_the_device_is_full() -> None:
    allocator = CachingAllocator(capacity=40 * MIB)
    allocator.allocate(0, 30 * MIB)
    allocator.free(0)
    assert allocator.reserved == 30 * MIB
    allocator.allocate(1, 32 * MIB)
    assert allocator.reserved == 32 * MIB
    with pytest.raises(DeviceFull):
        allocator.allocate(2, 12 * MIB)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40 * MIB), st.booleans()), max_size=60), st.randoms(use_true_random=False))
def test_what_is_allocated_is_covered_and_all_of_it_comes_back(
    requests: list[tuple[int, bool]], random: object
) -> None:
    allocator = CachingAllocator()
    live: dict[int, int] = {}
    for name, (size, let_go) in enumerate(requests):
        allocator.allocate(name, size)
        if size:
            live[name] = size
        if let_go and live:
            gone = random.choice(sorted(live))  # type: ignore[attr-defined]
            allocator.free(gone)
            del live[gone]
        assert sum(map(rounded, live.values())) <= allocator.allocated <= allocator.reserved <= allocator.reserved_peak
        assert allocator.allocated <= sum(map(rounded, live.values())) + len(live) * MIB
    for name in sorted(live):
        allocator.free(name)
    assert allocator.allocated == 0
    allocator.release_unused()
    assert allocator.reserved == 0, "a free block was not joined with its neighbours"
