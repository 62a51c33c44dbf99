"""Counters add up, quantiles are near the truth."""

import numpy as np

from flatshare.residency.stats import CacheStats, Durations
from flatshare.weights.tiers import Tier


def test_quantiles_are_within_a_bucket_of_the_truth() -> None:
    values = np.random.default_rng(0).lognormal(-5, 1, 5000)
    times = Durations()
    for value in values:
        times.add(float(value))
    for share in (0.5, 0.9, 0.99):
        truth = float(np.quantile(values, share))
        found = times.quantile_s(share)
        assert found is not None
        assert abs(found / truth - 1) < 0.1


def test_no_loads_no_quantile() -> None:
    assert Durations().quantile_s(0.5) is None


def test_extremes_are_counted() -> None:
    times = Durations()
    for value in (0.0, -1.0, 1e9):
        times.add(value)
    assert sum(times.counts) == 3


def test_totals_are_sums() -> None:
    one, two = CacheStats(loads=1, evictions=2), CacheStats(loads=10, load_failures=3)
    one.hits[Tier.DEVICE], two.hits[Tier.DEVICE], two.hits[Tier.STORE] = 5, 7, 1
    one.load_times.add(0.01)
    two.load_times.add(0.02)
    total = CacheStats.total([one, two])
    assert (total.loads, total.evictions, total.load_failures, total.requests) == (11, 2, 3, 13)
    assert total.hits == {Tier.DEVICE: 12, Tier.HOST: 0, Tier.PEER: 0, Tier.STORE: 1}
    assert sum(total.load_times.counts) == 2
    assert (one.loads, sum(one.load_times.counts)) == (1, 1), "the parts are not changed"
