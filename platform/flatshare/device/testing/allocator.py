"""torch's caching allocator for CUDA, as a count: segments, blocks, splitting, merging, giving back.

Follows ``CUDACachingAllocator.cpp`` of torch 2.14 (constants: c10/core/AllocatorConfig.h): pools by stream,
small requests in segments of 2 MiB, those below 10 MiB in segments of 20, best fit, remainders of large
blocks split off from 1 MiB; with expandable segments one segment a pool that grows by steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch

from flatshare.device.cuda import (
    BLOCK_BYTES,
    LARGE_BYTES,
    ROUND_BYTES,
    SEGMENT_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
)

__all__ = ["Block", "CachingAllocator"]

ENDLESS: Final = 1 << 45
"""Addresses of an expandable segment; what of it is mapped is what counts."""

Uses = dict[int, int]
"""By stream, the number of the last operation there that read or wrote a piece of memory."""


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment.

    Attributes
    ----------
    uses
        By whom it was used last, in this life and in earlier ones.
    """

    pool: tuple[int, bool]
    segment: int
    start: int
    size: int
    free: bool = True
    before: Block | None = None
    after: Block | None = None
    uses: Uses = field(default_factory=dict)


class CachingAllocator:
    """Counts the memory of one process on one device.

    Parameters
    ----------
    total_bytes
        Of the device.

    Attributes
    ----------
    others_bytes
        What other processes have of it.
    given_back
        Segments that are the device's again.
    """

    def __init__(self, total_bytes: int, *, expandable_segments: bool = False) -> None:
        self.total_bytes = total_bytes
        self.expandable = expandable_segments
        self.others_bytes = 0
        self.allocated = 0
        self.reserved = 0
        self.given_back: list[int] = []
        self._free: dict[tuple[int, bool], list[Block]] = {}
        self._mapped: dict[tuple[int, bool], int] = {}
        self._segments = 0

    def allocate(self, size: int, stream: int) -> Block:
        """A block of at least ``size`` bytes.

        Raises
        ------
        torch.OutOfMemoryError
            As torch does: after what is cached was given back.
        """
        size = max(-(-size // BLOCK_BYTES) * BLOCK_BYTES, BLOCK_BYTES)
        pool = (stream, size <= SMALL_BYTES)
        block = self._best(pool, size) or self._grown(pool, size)
        rest = block.size - size
        if rest >= BLOCK_BYTES if pool[1] or self.expandable else rest > SMALL_BYTES:
            after = Block(pool, block.segment, block.start + size, rest, True, block, block.after)
            after.uses = dict(block.uses)
            if block.after is not None:
                block.after.before = after
            block.after, block.size = after, size
            self._free.setdefault(pool, []).append(after)
        block.free = False
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Back into its pool, joined with its neighbours."""
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is None or not other.free:
                continue
            self._free[block.pool].remove(other)
            first, second = (other, block) if other is block.before else (block, other)
            first.size += second.size
            first.after = second.after
            if second.after is not None:
                second.after.before = first
            for stream, number in second.uses.items():
                first.uses[stream] = max(first.uses.get(stream, 0), number)
            block = first
        self._free.setdefault(block.pool, []).append(block)

    def segment_bytes(self, block: Block) -> int:
        """Of the segment that a block lies in; of one that grows, all that it could have."""
        if self.expandable:
            return self.total_bytes
        size, one = block.size, block
        while one.before is not None:
            one = one.before
            size += one.size
        one = block
        while one.after is not None:
            one = one.after
            size += one.size
        return size

    def give_back(self) -> None:
        """What nothing uses goes back to the device (``torch.cuda.empty_cache``)."""
        for pool, blocks in self._free.items():
            if self.expandable:
                last = next((one for one in blocks if one.after is None), None)
                used = self._stepped(pool, last.start) if last is not None else 0
                self.reserved -= self._mapped.get(pool, 0) - min(used, self._mapped.get(pool, 0))
                self._mapped[pool] = min(used, self._mapped.get(pool, 0))
                continue
            whole = [one for one in blocks if one.before is None and one.after is None]
            for one in whole:
                blocks.remove(one)
                self.reserved -= one.size
                self.given_back.append(one.segment)

    def _best(self, pool: tuple[int, bool], size: int) -> Block | None:
        fitting = [one for one in self._free.get(pool, ()) if one.size >= size]
        if not fitting:
            return None
        best = min(fitting, key=lambda one: (one.size, one.segment, one.start))
        if self.expandable:
            self._map(pool, best.start + size)
        self._free[pool].remove(best)
        return best

    def _grown(self, pool: tuple[int, bool], size: int) -> Block:
        if self.expandable:
            segment = Block(pool, self._next_segment(), 0, ENDLESS)
            self._free.setdefault(pool, []).append(segment)
            found = self._best(pool, size)
            assert found is not None, "it is endless"
            return found
        small = SMALL_SEGMENT_BYTES if pool[1] else SEGMENT_BYTES
        bytes_ = small if size < LARGE_BYTES else -(-size // ROUND_BYTES) * ROUND_BYTES
        self._take(bytes_)
        return Block(pool, self._next_segment(), 0, bytes_)

    def _map(self, pool: tuple[int, bool], end: int) -> None:
        wanted, have = self._stepped(pool, end), self._mapped.get(pool, 0)
        if wanted > have:
            self._take(wanted - have)
            self._mapped[pool] = self._mapped.get(pool, 0) + wanted - have  # giving back may have cut it

    def _take(self, size: int) -> None:
        if self.reserved + self.others_bytes + size > self.total_bytes:
            self.give_back()
        if self.reserved + self.others_bytes + size > self.total_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes (simulated)")
        self.reserved += size

    def _stepped(self, pool: tuple[int, bool], end: int) -> int:
        step = SMALL_SEGMENT_BYTES if pool[1] else SEGMENT_BYTES
        return -(-end // step) * step

    def _next_segment(self) -> int:
        self._segments += 1
        return self._segments
