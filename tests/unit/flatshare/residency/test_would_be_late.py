"""A request whose load's turn would come too late is refused at once, and told when to come again."""

from __future__ import annotations

import asyncio

import pytest

from flatshare.errors import WouldBeLate
from flatshare.residency.model_cache import ModelCache
from flatshare_registry.testing.faults import ManualClock

from .scripted import ScriptedLoader, make, settle, version


async def loaded(
    cache: ModelCache, loader: ScriptedLoader, clock: ManualClock, name: str, each_s: float
) -> None:
    """The load under way of a version takes so long."""
    clock.advance(each_s)
    loader.preparing[name].set()
    await settle()


async def test_a_cold_request_that_would_be_late_is_refused_at_once() -> None:
    clock, loader = ManualClock(), ScriptedLoader()
    cache = make(loader, 100, load_concurrency=1, clock=clock, fetch_timeout_s=60)
    versions = [version("flood", number) for number in range(1, 41)]
    for one in versions:
        loader.preparing[one.name] = asyncio.Event()
    waiting = [asyncio.create_task(cache.lease(one, 1000)) for one in versions]
    await settle()
    assert cache.wait_s == 0.0
    for one in versions[:20]:
        await loaded(cache, loader, clock, one.name, 2.0)
    assert cache.wait_s == pytest.approx(2 * 2.0), "of a tenant that has nothing waiting"
    late = version("flood", 99)
    with pytest.raises(WouldBeLate) as refused:
        await cache.lease(late, 30.0)
    assert refused.value.retry_after_s == 10, "20 turns of 2 s, less the 30 s that it has"
    assert (late.name in loader.prepared, cache.stats.load_failures) == (False, 0)
    quiet = asyncio.create_task(cache.lease(version("quiet"), 30.0))
    await settle()
    for one in versions[20:]:
        await loaded(cache, loader, clock, one.name, 2.0)
    assert quiet.done() and (await quiet).record.tenant == "quiet"
    assert all(task.done() for task in waiting)
    (await cache.lease(late, 30.0)).release()  # and comes to it when nobody is before it


async def test_who_joins_with_more_time_keeps_a_load_that_others_would_not_wait_for() -> None:
    clock, loader = ManualClock(), ScriptedLoader()
    cache = make(loader, 100, load_concurrency=1, clock=clock, fetch_timeout_s=60)
    first = version("acme", 1)
    loader.preparing[first.name] = asyncio.Event()
    holding = asyncio.create_task(cache.lease(first, 1000))
    await settle()
    wanted = version("acme", 2)
    hasty = asyncio.create_task(cache.lease(wanted, 0.05))
    await settle()
    patient = asyncio.create_task(cache.lease(wanted, 1000))
    with pytest.raises(Exception, match="not loaded within"):
        await hasty
    await loaded(cache, loader, clock, first.name, 5.0)
    assert (await asyncio.wait_for(patient, 5)).record.name == wanted.name
    (await holding).release()
