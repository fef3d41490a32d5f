"""What CUDA's caching allocator takes from the device for a sequence of tensor allocations and frees.

The rules are those of c10/cuda/CUDACachingAllocator.cpp of torch 2.13 with its default settings, one stream:

    a request is rounded up to 512 bytes                                                kMinBlockSize
    up to 1 MiB it comes from the small pool, which takes segments of 2 MiB             kSmallSize, kSmallBuffer
    below 10 MiB from segments of 20 MiB, else from one of its own, in steps of 2 MiB   kMinLargeAlloc, kLargeBuffer, kRoundLarge
    the smallest free block that fits is taken, of equals the lowest address            best fit
    what is left of it becomes a free block: in the small pool from 512 bytes on, in the large one above 1 MiB
    a freed block joins its free neighbours; segments are given back only when the device is full

`reserved` is what `torch.cuda.memory_reserved()` says and nvidia-smi shows (with the context); `allocated` the rounded live bytes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20
SMALLEST, SMALL, SMALL_SEGMENT = 512, MIB, 2 * MIB
LARGE_FROM, LARGE_SEGMENT, LARGE_STEP = 10 * MIB, 20 * MIB, 2 * MIB


class DeviceFull(Exception):
    """No segment of `bytes` can be had, even with every unused one given back."""

    def __init__(self, size: int):
        super().__init__(f"{size:,} bytes")
        self.size = size


@dataclass
class _Block:
    """A piece of a segment; `before` and `after` are its neighbours there."""

    segment: int
    address: int
    size: int
    small: bool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.address


class CachingAllocator:
    """`capacity` bounds what may be reserved, None for no bound."""

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity
        self.reserved = self.reserved_peak = 0
        self.allocated = self.allocated_peak = 0
        self._address = 0
        self._live: dict[int, _Block] = {}
        self._pools: dict[bool, list[tuple[tuple[int, int], _Block]]] = {True: [], False: []}
        """Free blocks by (size, address)."""

    def allocate(self, tensor: int, size: int) -> None:
        """A storage of `size` bytes named `tensor`; nothing is taken for an empty one. Raises DeviceFull."""
        if size == 0:
            return
        size = rounded(size)
        small = size <= SMALL
        block = self._take(size, small) or self._new_segment(size, small)
        left = block.size - size
        if left >= SMALLEST if small else left > SMALL:
            rest = _Block(block.segment, block.address + size, left, small, True, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        block.free = False
        self._live[tensor] = block
        self.allocated += block.size
        self.allocated_peak = max(self.allocated_peak, self.allocated)

    def free(self, tensor: int) -> None:
        block = self._live.pop(tensor, None)
        if block is None:
            return
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._remove(other)
                block = _joined(other, block) if other is block.before else _joined(block, other)
        self._put(block)

    def release_unused(self) -> None:
        """Give back every segment that is one free block, as the allocator does before it gives up."""
        for small in (True, False):
            for _, block in list(self._pools[small]):
                if block.before is None and block.after is None:
                    self._remove(block)
                    self.reserved -= block.size

    def _take(self, size: int, small: bool) -> _Block | None:
        pool = self._pools[small]
        place = bisect_left(pool, (size, -1), key=lambda item: item[0])
        if place == len(pool):
            return None
        return pool.pop(place)[1]

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            length = SMALL_SEGMENT
        elif size < LARGE_FROM:
            length = LARGE_SEGMENT
        else:
            length = -(-size // LARGE_STEP) * LARGE_STEP
        if self.capacity is not None and self.reserved + length > self.capacity:
            self.release_unused()
            if self.reserved + length > self.capacity:
                raise DeviceFull(size)
        self.reserved += length
        self.reserved_peak = max(self.reserved_peak, self.reserved)
        block = _Block(self._address, self._address, length, small)
        self._address += length
        return block

    def _put(self, block: _Block) -> None:
        insort(self._pools[block.small], (block.key, block), key=lambda item: item[0])

    def _remove(self, block: _Block) -> None:
        pool = self._pools[block.small]
        place = bisect_left(pool, block.key, key=lambda item: item[0])
        assert pool[place][1] is block
        pool.pop(place)


def rounded(size: int) -> int:
    """Bytes a live tensor of `size` bytes takes."""
    return -(-size // SMALLEST) * SMALLEST


def _joined(first: _Block, second: _Block) -> _Block:
    """`first` with its right-hand neighbour `second` in it."""
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    first.free = True
    return first
