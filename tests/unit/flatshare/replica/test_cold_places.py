"""Places for cold requests: a tenant that takes all it can leaves room for another's first request."""

from __future__ import annotations

import asyncio

import pytest

from flatshare.errors import Overloaded
from flatshare.replica.build import cold_places


async def test_one_tenant_can_not_take_all_cold_places() -> None:
    places = cold_places(8)
    flood = [asyncio.create_task(places.enter(10, "flood")) for _ in range(40)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sum(task.done() for task in flood) >= 30, "what has no place is told at once"
    quiet = asyncio.create_task(places.enter(10, "quiet"))
    await asyncio.sleep(0)
    assert not quiet.done()
    places.leave()
    places.leave()
    await asyncio.wait_for(quiet, 1)
    refused = [task for task in flood if task.done() and isinstance(task.exception(), Overloaded)]
    assert refused
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)


async def test_an_empty_queue_still_takes_one() -> None:
    places = cold_places(0)
    await places.enter(1, "acme")
    waiting = asyncio.create_task(places.enter(10, "globex"))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await places.enter(10, "globex")
    places.leave()
    await waiting
