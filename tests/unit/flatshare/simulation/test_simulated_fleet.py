"""The simulated fleet: its caches are the replica's, its homes the edge's, and it does what a fleet does."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatshare.placement.ring import Ring, ring_keys
from flatshare.placement.scaling import Bounds
from flatshare.residency.policy import POLICIES
from flatshare.simulation.cache import HostCache, SlotCache
from flatshare.simulation.fleet import Absence, FleetSetup, simulate
from flatshare.simulation.references import belady_hits, lru_hits
from flatshare.simulation.trace import tide_trace, zipf_trace

from ..residency.scripted import ScriptedLoader, make, version


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(1, 4), st.sampled_from(["lru", "sieve"])
)
def test_a_simulated_cache_holds_what_the_replicas_own_would(
    asked: list[int], slots: int, policy: str
) -> None:
    async def real() -> list[bool]:
        cache = make(ScriptedLoader(), slots, policy=POLICIES[policy]())
        hits = []
        for number in asked:
            one = version(f"t{number}")
            lease = cache.try_lease(one)
            hits.append(lease is not None)
            (lease or await cache.lease(one, 5)).release()
        return hits

    simulated = SlotCache(slots, policy)
    assert [simulated.ask(number) for number in asked] == asyncio.run(real())


def test_many_homes_at_once_are_those_of_one_at_a_time() -> None:
    ring = Ring(range(0, 40, 3))
    refs = [f"t{number}" for number in range(3000)] + ["acme:production", "acme"]
    keys = ring_keys(refs)
    assert ring.home_of_each(keys).tolist() == [ring.home(ref) for ref in refs]


def test_a_steady_fleet_is_nearly_one_cache_of_its_slots() -> None:
    trace = zipf_trace(2000, 1.0, 80_000, rate=500.0)
    found = simulate(trace, FleetSetup(replicas=4, slots=50, warm_s=80.0, host_models=3000))
    after = trace.at_s >= 80
    one = lru_hits(trace.models, 200)[after].mean()
    assert 0.96 * one < found.hit_rate <= belady_hits(trace.models, 200)[after].mean()
    assert found.duplicate_factor == pytest.approx(1.0, abs=0.02)
    assert found.requests == pytest.approx(after.sum(), rel=0.01)
    first = len(set(trace.models[after].tolist()) - set(trace.models[~after].tolist()))
    assert found.store_loads == pytest.approx(first, abs=20), (
        "the host tier has all that was asked for before"
    )


def test_popular_models_that_chance_put_together_are_moved() -> None:
    trace = zipf_trace(300, 1.2, 60_000, rate=200.0, seed=5)
    found = simulate(trace, FleetSetup(replicas=6, slots=10))
    assert 1 <= len(found.moved) <= 30


def test_a_hot_model_gets_copies_and_they_count_as_duplicates() -> None:
    trace = zipf_trace(50, 2.0, 20_000, rate=200.0)
    calm = simulate(trace, FleetSetup(replicas=4, slots=8, warm_s=50))
    hot = simulate(trace, FleetSetup(replicas=4, slots=8, service_s=0.1, warm_s=50))
    assert calm.duplicate_factor == pytest.approx(1.0, abs=0.01) and hot.duplicate_factor > 1.01


def test_a_node_that_is_lost_rehomes_its_own_models_and_they_come_back() -> None:
    trace = zipf_trace(1000, 0.8, 60_000, rate=200.0)
    lost = Absence(at_s=150.0, for_s=30.0, places=(0, 1), host_lost=True)
    found = simulate(trace, FleetSetup(replicas=8, slots=30, replicas_a_node=2, absences=(lost,)))
    away, back = found.rehomed
    assert away == pytest.approx(0.25, abs=0.05) and back == pytest.approx(away, abs=0.02)
    assert found.replicas[160] == 6 and found.replicas[-1] == 8
    usual, dip, after = (np.mean(found.hit_rates[a:b]) for a, b in ((120, 150), (150, 155), (250, 300)))
    assert dip < usual - 0.05 and after > usual - 0.03


def test_the_number_of_replicas_follows_the_tide() -> None:
    trace = tide_trace(500, 1.0, 40_000, day_s=2000.0, low=0.1)
    bounds = Bounds(1, 20, target_ongoing_requests=4, upscale_delay_s=5, downscale_delay_s=30, idle_s=60)
    found = simulate(trace, FleetSetup(replicas=2, slots=20, service_s=1.0, bounds=bounds))
    assert max(found.replicas[900:1100]) >= 5 > found.replicas[-1]
    assert found.requests == len(trace)


def test_a_host_tier_keeps_what_was_loaded_last() -> None:
    host = HostCache(2)
    assert [host.ask(one) for one in (1, 2, 1, 3, 2, 3)] == [False, False, True, False, False, True]
