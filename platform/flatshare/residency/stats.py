"""What a replica counts of its cache; small, and addable over replicas."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from flatshare.weights.tiers import Tier

__all__ = ["CacheStats", "Durations"]

_BUCKETS_A_DOUBLING: Final = 8
"""Durations fall into buckets 9 % wide: good enough for a p99, and 240 numbers cover 1 us to 18 min."""

_BUCKETS: Final = 240
_SMALLEST_S: Final = 1e-6
_MIDDLES_S: Final = tuple(_SMALLEST_S * 2 ** ((n + 0.5) / _BUCKETS_A_DOUBLING) for n in range(_BUCKETS))


@dataclass(slots=True)
class Durations:
    """A histogram of durations with log-spaced buckets, so that replicas' can be added.

    Attributes
    ----------
    seconds
        Of all together.
    """

    counts: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        position = math.log2(max(seconds, _SMALLEST_S) / _SMALLEST_S) * _BUCKETS_A_DOUBLING
        self.counts[min(int(position), _BUCKETS - 1)] += 1
        self.seconds += seconds

    def within(self, seconds: float) -> int:
        """How many took at most this many seconds, accurate to the width of a bucket."""
        return sum(self.counts[: bisect.bisect_right(_MIDDLES_S, seconds)])

    def quantile_s(self, share: float) -> float | None:
        """Seconds within which this share of loads ended (the bucket's middle); None without any."""
        wanted = share * sum(self.counts)
        if not wanted:
            return None
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            if seen >= wanted:
                return _MIDDLES_S[index]
        raise AssertionError("the counts sum to less than their sum")


@dataclass(slots=True)
class CacheStats:
    """Counters since the replica started.

    Attributes
    ----------
    hits
        Leases granted, by the tier that the model came from.
    loads, load_failures
        Loads begun that ended well, or not.
    probes_failed
        Of these loads, and of first requests after them, those in which a model did not answer its probe.
    evictions
        Residents removed to make room.
    quarantined
        Slots taken out of use because an isolation check failed.
    swaps
        Swaps whose new version took over from a resident old one.
    """

    hits: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    loads: int = 0
    load_failures: int = 0
    probes_failed: int = 0
    evictions: int = 0
    quarantined: int = 0
    swaps: int = 0
    load_times: Durations = field(default_factory=Durations)

    @property
    def requests(self) -> int:
        """Leases granted in all."""
        return sum(self.hits.values())

    @classmethod
    def total(cls, parts: Sequence[CacheStats]) -> CacheStats:
        """The sum over several replicas."""
        total = cls()
        for part in parts:
            for tier in Tier:
                total.hits[tier] += part.hits[tier]
            total.loads += part.loads
            total.load_failures += part.load_failures
            total.probes_failed += part.probes_failed
            total.evictions += part.evictions
            total.quarantined += part.quarantined
            total.swaps += part.swaps
            total.load_times.counts = [
                one + other
                for one, other in zip(total.load_times.counts, part.load_times.counts, strict=True)
            ]
            total.load_times.seconds += part.load_times.seconds
        return total
