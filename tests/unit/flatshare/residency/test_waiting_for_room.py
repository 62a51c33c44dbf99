"""Loads that wait for room: who is let in, what they hold meanwhile, what they are told, and what the ledger says after."""

from __future__ import annotations

import asyncio

import pytest

from flatshare.errors import DeadlineExceeded, ModelFailed, NoRoom
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import ModelKey, State
from flatshare_registry.errors import Corrupt
from flatshare_registry.records import VersionRecord

from .scripted import SIZE, ScriptedLoader, make, part, resident, settle, use, version


@pytest.fixture
def loader() -> ScriptedLoader:
    return ScriptedLoader()


async def test_one_lease_that_ends_makes_room_for_all_that_fit_and_each_is_counted(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader, slots=10, budget=100, room_timeout_s=60, load_concurrency=8)
    loader.parts["big@1"] = {part("big"): 100}
    lease = await cache.lease(version("big"), 5)
    waiting = [asyncio.create_task(cache.lease(version(f"small-{n}"), 60)) for n in range(4)]
    await settle()
    assert not any(task.done() for task in waiting)
    assert (cache.ledger.held_bytes, cache.ledger.reserved_bytes, cache.occupied) == (100, 0, 1)
    lease.release()
    leases = await asyncio.wait_for(asyncio.gather(*waiting), 2)
    assert resident(cache) == {f"small-{n}@1" for n in range(4)}
    assert (cache.ledger.held_bytes, cache.ledger.reserved_bytes, cache.occupied) == (4 * SIZE, 0, 4)
    for one in leases:
        one.release()
    assert cache.loading == []


async def test_loads_that_wait_for_each_others_parts_all_end_and_hold_what_they_should(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader, slots=10, budget=60, room_timeout_s=60, load_concurrency=4)
    for name in "xy":
        base = {part(f"base-{name}"): 25}
        loader.parts[f"{name}@1"] = base | {part(f"head-{name}"): 10}
        loader.parts[f"{name}@2"] = base | {part(f"more-{name}"): 20}
    holder = await cache.lease(version("x"), 5)
    waiting = [
        asyncio.create_task(use(cache, version(name, number)))
        for name, number in (("y", 1), ("y", 2), ("x", 2))
    ]
    await settle()
    holder.release()
    await asyncio.wait_for(asyncio.gather(*waiting), 3)
    parts = {one: size for record in cache.resident_records() for one, size in loader.check(record).items()}
    assert cache.ledger.held_bytes == sum(parts.values()) <= 60
    assert (cache.ledger.reserved_bytes, cache.occupied) == (0, len(resident(cache)))
    for record in list(cache.resident_records()):
        cache.unload(ModelKey.of(record))
    assert (cache.ledger.held_bytes, cache.occupied) == (0, 0), "nothing was counted that nobody holds"


async def test_a_load_that_waits_for_room_says_so_when_its_callers_time_is_over(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader, slots=1, room_timeout_s=60)
    with await cache.lease(version("a"), 1):
        with pytest.raises(NoRoom, match="no room for b@1: all 1 slots"):
            await cache.lease(version("b"), 0.05)
    loader.preparing["c@1"] = asyncio.Event()
    with pytest.raises(DeadlineExceeded, match="c@1 was not loaded within"):
        await cache.lease(version("c"), 0.05)
    await cache.close(1)


async def test_a_load_that_found_room_and_is_slow_again_is_late_and_not_without_room(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader, slots=1, room_timeout_s=60)
    lease = await cache.lease(version("a"), 1)
    waiting = asyncio.create_task(cache.lease(version("b"), 0.2))
    await settle()
    loader.preparing["b@1"] = asyncio.Event()
    lease.release()  # now it begins again, and hangs
    with pytest.raises(DeadlineExceeded, match="b@1 was not loaded"):
        await waiting
    await cache.close(1)


async def test_no_room_within_the_time_for_it_is_told_at_once_and_evicts_nothing(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader, slots=1, room_timeout_s=0.02)
    lease = await cache.lease(version("a"), 1)
    with pytest.raises(NoRoom, match="no room for b@1"):
        await cache.lease(version("b"), 60)
    assert (resident(cache), cache.loading, cache.stats.evictions) == ({"a@1"}, [], 0)
    lease.release()


async def test_evictions_are_told_also_where_the_load_they_were_for_fails(loader: ScriptedLoader) -> None:
    """Promise 8: what is advertised is what is held."""
    told: list[set[str]] = []
    cache = make(loader, slots=1, on_change=lambda: told.append(resident(cache)))
    await use(cache, version("a"))
    loader.place_errors["b@1"] = ModelFailed("the device refused it")
    with pytest.raises(ModelFailed):
        await cache.lease(version("b"), 5)
    assert (resident(cache), told[-1]) == (set(), set())
    assert (cache.stats.evictions, cache.stats.load_failures, cache.occupied, cache.ledger.held_bytes) == (
        1,
        1,
        0,
        0,
    )


async def test_a_load_that_is_under_way_can_be_seen_until_it_ends_well_or_badly(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader)
    for name, error in (("a", None), ("b", Corrupt("bad"))):
        gate = loader.preparing[f"{name}@1"] = asyncio.Event()
        if error is not None:
            loader.prepare_errors[f"{name}@1"] = error
        asked = asyncio.create_task(cache.lease(version(name), 5))
        await settle()
        assert cache.is_loading(version(name)) and not cache.is_loading(version(name, 2))
        assert not cache.is_loading(version("other"))
        gate.set()
        await asyncio.gather(asked, return_exceptions=True)
        assert not cache.is_loading(version(name))
        assert cache.record_of(ModelKey(name, 1)) == (version(name) if error is None else None)


async def test_a_pin_that_could_not_be_given_leaves_the_model_as_it_was(loader: ScriptedLoader) -> None:
    cache = make(loader, slots=3)
    for name in ("a", "b"):
        await cache.preload(version(name), 5, pin=True)
    with pytest.raises(NoRoom, match="pinning c@1 would leave none of 3 slots"):
        await cache.preload(version("c"), 5, pin=True)
    assert "c@1" not in loader.prepared, "nothing is loaded for it, so nothing can be evicted for it"
    assert not cache.is_pinned(ModelKey("c", 1)) and cache.is_pinned(ModelKey("a", 1))
    await cache.preload(version("a"), 5, pin=True)  # the same again is no second pin
    assert (
        cache.unpin(ModelKey("a", 1))
        and not cache.unpin(ModelKey("a", 1))
        and not cache.unpin(ModelKey("x", 1))
    )
    await cache.preload(version("c"), 5, pin=True)
    assert {str(key) for key in map(ModelKey.of, cache.resident_records()) if cache.is_pinned(key)} == {
        "b@1",
        "c@1",
    }


async def test_pins_take_at_most_half_of_the_bytes_and_what_they_share_counts_once(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader, slots=10, budget=100)
    loader.parts |= {f"{name}@1": {part("base"): 30, part(name): 10} for name in "abc"}
    await cache.preload(version("a"), 5, pin=True)
    await cache.preload(version("b"), 5, pin=True)  # 50 bytes: just half
    with pytest.raises(NoRoom, match="more than half of the 100 bytes"):
        await cache.preload(version("c"), 5, pin=True)


async def test_an_unpinned_model_is_room_for_who_waits(loader: ScriptedLoader) -> None:
    cache = make(loader, slots=2, room_timeout_s=60)
    await cache.preload(version("a"), 5, pin=True)
    with await cache.lease(version("b"), 5):
        waiting = asyncio.create_task(use(cache, version("c")))
        await settle()
        assert not waiting.done()
        assert cache.unpin(ModelKey("a", 1))
        await asyncio.wait_for(waiting, 2)
    assert resident(cache) == {"b@1", "c@1"}


async def test_a_preload_counts_as_no_request_and_a_hit_of_the_model_is_one(loader: ScriptedLoader) -> None:
    cache = make(loader)
    await cache.preload(version("a"), 5)
    await cache.preload(version("a"), 5)
    assert (cache.stats.requests, [info.hits for info in cache.snapshot()]) == (0, [0])
    await use(cache, version("a"))
    assert (cache.stats.requests, [info.hits for info in cache.snapshot()]) == (1, [1])


async def test_a_quarantined_model_is_seen_as_that_until_it_is_unloaded(loader: ScriptedLoader) -> None:
    told: list[int] = []
    cache = make(loader, on_change=lambda: told.append(1))
    with await cache.lease(version("a"), 5) as lease:
        told.clear()
        cache.quarantine(lease)
        cache.quarantine(lease)
        assert (cache.stats.quarantined, told) == (1, [1])
    assert [info.state for info in cache.snapshot()] == [State.QUARANTINED]
    assert not cache.unload(ModelKey("a", 2)) and cache.occupied == 1
    assert cache.unload(ModelKey("a", 1)) and cache.occupied == 0
    assert not cache.unload(ModelKey("a", 1))


async def test_a_model_that_is_unloaded_while_it_is_leased_counts_until_then_and_frees_once(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader, budget=100)
    first, second = await cache.lease(version("a"), 5), await cache.lease(version("a"), 5)
    assert cache.unload(ModelKey("a", 1))
    assert ([info.state for info in cache.snapshot()], cache.ledger.held_bytes) == ([State.DRAINING], SIZE)
    first.release()
    first.release()
    assert (cache.occupied, cache.ledger.held_bytes) == (1, SIZE)
    second.release()
    assert (cache.snapshot(), cache.occupied, cache.ledger.held_bytes) == ([], 0, 0)


async def test_a_snapshot_has_the_most_recently_used_first(loader: ScriptedLoader) -> None:
    now = [100.0]
    cache = make(loader, wall_clock=lambda: now[0])
    for name in ("a", "b", "a", "c"):
        now[0] += 1
        await use(cache, version(name))
    assert [(info.tenant, info.last_used_at, info.loaded_at) for info in cache.snapshot()] == [
        ("c", 104, 104), ("a", 103, 101), ("b", 102, 102),
    ]  # fmt: skip
    assert [info.generation for info in cache.snapshot()] == [3, 1, 2]


async def test_a_load_that_is_larger_than_it_claimed_takes_bytes_and_no_second_slot(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader, slots=2, budget=100)
    await use(cache, version("a"))
    place = loader.place

    async def larger(record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        placed = await place(record, prepared, held)
        return Placed(placed.model, {**placed.parts, part("more"): SIZE})

    loader.place = larger  # type: ignore[method-assign]  # measured, it takes twice what it claimed
    await use(cache, version("b"))
    assert (resident(cache), cache.stats.evictions) == ({"a@1", "b@1"}, 0)
    assert (cache.ledger.held_bytes, cache.ledger.reserved_bytes, cache.occupied) == (3 * SIZE, 0, 2)


async def test_each_load_is_counted_with_the_time_that_it_took(loader: ScriptedLoader) -> None:
    now = [100.0]
    cache = make(loader, clock=lambda: now[0])
    gate = loader.preparing["a@1"] = asyncio.Event()
    loading = asyncio.create_task(use(cache, version("a")))
    await settle()
    now[0] += 3
    gate.set()
    await loading
    times = cache.stats.load_times
    assert (cache.stats.loads, sum(times.counts)) == (1, 1)
    median_s = times.quantile_s(0.5)
    assert median_s is not None and 3 <= median_s <= 6, "to the next step of its scale"
