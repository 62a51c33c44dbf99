"""Memory that a pass gave back is kept for the next one.

glibc hands memory back to the kernel as soon as it is free at the end of a heap, and a pass frees all that it
took: each pass of 64 images then has its activations (8 MB) mapped, zeroed and unmapped again, which takes a
third of its time. The allocator is told to keep some (mallopt(3)).
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3

KEPT_BYTES: Final = 64 * 1024**2
"""Kept free at the end of each heap: what a pass of 64 images of ``mnist-cnn`` takes, and the weights of some
loads. Requests of 64 images to one replica: one hot tenant 3,261 images/s without and 4,399 with, 20 in turn
3,497 and 4,392 (``scripts/bench-gpu --device cpu``, medians of three; Intel Xeon), for 40 to 150 MB more of a
replica's memory."""

MOST_HEAP_BYTES: Final = 32 * 1024**2
"""Larger pieces are mapped on their own; glibc takes no larger number."""


def keep_freed_memory() -> bool:
    """Make this process keep memory for its next pass; returns whether it does.

    Where the environment says how glibc's allocator is to work (``MALLOC_…_``, ``GLIBC_TUNABLES``), and where
    there is another C library, nothing is changed.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = [
        mallopt(_M_MMAP_THRESHOLD, MOST_HEAP_BYTES),
        mallopt(_M_TRIM_THRESHOLD, 4 * KEPT_BYTES),
        mallopt(_M_TOP_PAD, KEPT_BYTES),
    ]
    return all(done)
