"""Erasure in a replica's cache: nothing of the tenant is left when it says so, loads under way included."""

from __future__ import annotations

import asyncio

import pytest

from flatshare.weights.tiers import ModelKey
from flatshare_registry.errors import NotFound

from .scripted import SIZE, ScriptedLoader, make, part, resident, settle, use, version


@pytest.fixture
def loader() -> ScriptedLoader:
    return ScriptedLoader()


@pytest.mark.parametrize("where", ["preparing", "placing"])
async def test_nothing_is_called_erased_while_a_load_of_the_tenant_is_under_way(
    loader: ScriptedLoader, where: str
) -> None:
    cache = make(loader)
    gate = getattr(loader, where)["acme@1"] = asyncio.Event()
    loading = asyncio.create_task(cache.lease(version("acme"), 5))
    await settle()
    cache.erase("acme")
    assert not await cache.erased("acme", 0.01), "the load may hold its weights"
    waiting = asyncio.create_task(cache.erased("acme", 5))
    await settle()
    assert not waiting.done()
    gate.set()
    assert await waiting
    with pytest.raises(NotFound, match="acme@1 was erased"):
        await loading
    assert (resident(cache), cache.loading, cache.occupied, cache.ledger.held_bytes) == (set(), [], 0, 0)
    assert loader.let_go_of >= 2, "what the load had prepared is not kept ready either"


async def test_nothing_is_called_erased_while_a_lease_lives(loader: ScriptedLoader) -> None:
    cache = make(loader)
    lease = await cache.lease(version("acme"), 5)
    told = cache.erase("acme")
    assert not await cache.erased("acme", 0.01)
    waiting = asyncio.create_task(cache.erased("acme", 5))
    await settle()
    assert (waiting.done(), loader.scrubbed) == (False, [])
    lease.release()
    assert await waiting
    assert (told.models, told.overwritten_bytes, loader.scrubbed) == (1, SIZE, ["acme@1"])


async def test_other_tenants_loads_and_leases_are_not_waited_for(loader: ScriptedLoader) -> None:
    cache = make(loader)
    loader.preparing["globex@1"] = asyncio.Event()
    loading = asyncio.create_task(cache.lease(version("globex"), 5))
    lease = await cache.lease(version("initech"), 5)
    await use(cache, version("acme"))
    cache.erase("acme")
    assert await cache.erased("acme", 5)
    loader.preparing["globex@1"].set()
    (await loading).release()
    lease.release()
    assert resident(cache) == {"globex@1", "initech@1"}


async def test_a_load_that_an_erasure_overtook_on_the_device_is_overwritten_there(
    loader: ScriptedLoader,
) -> None:
    """All but what another tenant has too."""
    cache = make(loader, budget=100)
    loader.parts |= {
        "globex@1": {part("base"): 10, part("globex"): 10},
        "acme@1": {part("base"): 10, part("acme"): 10, part("more"): 10},
    }
    await use(cache, version("globex"))
    loader.placing["acme@1"] = asyncio.Event()
    loading = asyncio.create_task(cache.lease(version("acme"), 5))
    while "acme@1" not in loader.placed:
        await asyncio.sleep(0)
    cache.erase("acme")
    loader.placing["acme@1"].set()
    with pytest.raises(NotFound):
        await loading
    assert await cache.erased("acme", 5)
    assert loader.scrubbed == ["acme", "more"]
    assert (cache.ledger.held_bytes, cache.ledger.reserved_bytes, cache.occupied) == (20, 0, 1)
    assert (cache.stats.loads, resident(cache)) == (1, {"globex@1"})


async def test_a_load_of_a_withdrawn_version_is_overwritten_too(loader: ScriptedLoader) -> None:
    cache = make(loader)
    loader.placing["acme@1"] = asyncio.Event()
    loading = asyncio.create_task(cache.lease(version("acme"), 5))
    while "acme@1" not in loader.placed:
        await asyncio.sleep(0)
    cache.withdraw(ModelKey("acme", 1))
    loader.placing["acme@1"].set()
    with pytest.raises(NotFound):
        await loading
    assert (loader.scrubbed, cache.occupied, cache.ledger.held_bytes) == (["acme@1"], 0, 0)


async def test_who_asks_for_a_version_whose_load_an_erasure_overtook_does_not_join_it(
    loader: ScriptedLoader,
) -> None:
    cache = make(loader)
    gate = loader.preparing["acme@1"] = asyncio.Event()
    loading = asyncio.create_task(cache.lease(version("acme"), 5))
    await settle()
    cache.erase("acme")
    with pytest.raises(NotFound, match="was erased"):
        await cache.lease(version("acme"), 5)
    gate.set()
    with pytest.raises(NotFound):
        await loading


async def test_what_is_erased_while_quarantined_goes_and_is_overwritten_once(loader: ScriptedLoader) -> None:
    cache = make(loader)
    with await cache.lease(version("acme"), 5) as lease:
        cache.quarantine(lease)
    assert cache.occupied == 1
    told = cache.erase("acme")
    assert cache.erase("acme") is told
    assert await cache.erased("acme", 1)
    assert (told.models, loader.scrubbed, cache.occupied) == (1, ["acme@1"], 0)
