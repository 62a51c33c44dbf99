"""Floors and caps by themselves: what may go for another tenant's model, and what must go for one's own."""

from __future__ import annotations

import pytest

from flatshare.errors import NoRoom, ResidentOverQuota
from flatshare.residency.lease import Resident
from flatshare.residency.tenant_limits import NO_BOUNDS, TenantBounds, own_victims, spare_floors
from flatshare.weights.tiers import LeaseTag, ModelKey, State, Tier

from .scripted import SIZE, ScriptedLoader, make, part, resident, use, version

GB = 10**9


def holding(*models: tuple[str, int, int]) -> dict[ModelKey, Resident]:
    """Residents: tenant, version and bytes of each."""
    found = {}
    for tenant, number, size in models:
        record = version(tenant, number)
        found[ModelKey(tenant, number)] = Resident(
            record=record, model=None, parts={part(record.name): size}, tier=Tier.STORE,
            tag=LeaseTag(tenant, number, record.digest, number), loaded_at=0, last_used_at=0,
        )  # fmt: skip
    return found


def spared(
    residents: dict[ModelKey, Resident], floors: dict[str, int], tenant: str = "new", slots: int = 100,
    budget: int | None = None,
) -> list[str]:  # fmt: skip
    """What may not go."""
    allowed = spare_floors(
        residents, residents, lambda one: TenantBounds(None, floors.get(one, 0)), tenant, slots, budget
    )
    return [str(key) for key in residents if key not in allowed]


def test_without_a_floor_all_may_go_in_their_order() -> None:
    residents = holding(("a", 1, 10), ("b", 1, 10), ("a", 2, 10))
    assert spare_floors(residents, residents, lambda one: NO_BOUNDS, "new", 10, 100) == list(residents)


def test_a_tenant_keeps_its_floor_and_no_more_however_many_of_its_models_go_for_one_load() -> None:
    residents = holding(*(("a", number, 10) for number in range(1, 7)))
    assert spared(residents, {"a": 25}) == ["a@4", "a@5", "a@6"]
    assert spared(residents, {"a": 30}) == ["a@4", "a@5", "a@6"]
    assert spared(residents, {"a": 31}) == ["a@3", "a@4", "a@5", "a@6"]
    assert spared(residents, {"a": 60}) == list(map(str, residents))
    assert spared(residents, {"a": 25}, tenant="a") == [], "its own floor does not hold against itself"


def test_a_large_model_that_is_spared_does_not_make_the_small_ones_go_below_the_floor() -> None:
    residents = holding(("a", 1, 50), ("a", 2, 10), ("a", 3, 10))
    assert spared(residents, {"a": 40}) == ["a@1"], "without the small ones it has its floor still"
    assert spared(residents, {"a": 65}) == ["a@1", "a@2", "a@3"]


async def test_one_large_load_that_takes_several_models_leaves_each_its_floor() -> None:
    loader = ScriptedLoader()
    cache = make(
        loader, slots=40, budget=100, room_timeout_s=0.01,
        bounds_of=lambda tenant: TenantBounds(None, 30 if tenant == "a" else 0),
    )  # fmt: skip
    for number in range(1, 7):
        loader.parts[f"a@{number}"] = {part(f"a{number}"): 10}
        await use(cache, version("a", number))
    loader.parts["b@1"] = {part("b"): 70}
    await use(cache, version("b"))
    assert resident(cache) == {"a@4", "a@5", "a@6", "b@1"}
    loader.parts["c@1"] = {part("c"): 80}
    with pytest.raises(NoRoom):
        await use(cache, version("c"))
    assert resident(cache) == {"a@4", "a@5", "a@6", "b@1"}


def test_floors_keep_a_quarter_of_the_slots_for_one_and_leave_an_eighth_to_everybody() -> None:
    many = holding(*(("a", number, 1) for number in range(1, 9)))
    assert spared(many, {"a": GB}, slots=8) == ["a@7", "a@8"], "a quarter of eight"
    for slots in (2, 3, 4, 7):
        few = holding(*(("a", number, 1) for number in range(1, slots + 1)))
        assert spared(few, {"a": GB}, slots=slots) == [f"a@{slots}"], (
            "one at least, and one at most of so few"
        )
    each = holding(*((tenant, 1, 1) for tenant in "abcdefgh"))
    assert spared(each, dict.fromkeys("abcdefgh", GB), slots=8) == [f"{one}@1" for one in "abcdefg"]
    more = holding(*((f"t{number}", 1, 1) for number in range(16)))
    assert len(spared(more, {f"t{number}": GB for number in range(16)}, slots=16)) == 14
    assert spared(holding(("a", 1, 1)), {"a": GB}, slots=1) == ["a@1"]


def test_floors_of_all_together_leave_an_eighth_of_the_bytes() -> None:
    each = holding(*((tenant, 1, 10) for tenant in "abcdefgh"))
    floors = dict.fromkeys("abcdefgh", 10)
    assert spared(each, floors, budget=80) == [f"{one}@1" for one in "abcdefg"]
    assert spared(each, floors, budget=None) == list(map(str, each)), "without a budget there is no eighth"
    assert spared(holding(("a", 1, 75)), {"a": 75}, budget=80) == [], "more than floors may keep in all"
    assert spared(holding(("a", 1, 70)), {"a": 70}, budget=80) == ["a@1"]


async def test_floors_that_promise_all_the_bytes_still_let_somebody_new_in() -> None:
    """With slots in plenty: it is the bytes that bind."""
    loader = ScriptedLoader()
    cache = make(
        loader, slots=64, budget=80, room_timeout_s=0.01,
        bounds_of=lambda tenant: TenantBounds(None, 0 if tenant == "new" else 10),
    )  # fmt: skip
    for tenant in "abcdefgh":
        loader.parts[f"{tenant}@1"] = {part(tenant): 10}
        await use(cache, version(tenant))
    loader.parts["new@1"] = {part("new"): 10}
    await use(cache, version("new"))
    assert "new@1" in resident(cache) and len(resident(cache)) == 8


def own(
    size: int, cap: int | None, residents: dict[ModelKey, Resident], leaving: dict[ModelKey, Resident] | None = None,
    keys: list[ModelKey] | None = None,
) -> list[str] | None:  # fmt: skip
    found = own_victims(
        "a", size, cap, residents if keys is None else keys, residents, (leaving or {}).values()
    )
    return None if found is None else list(map(str, found))


def test_own_models_go_for_a_cap_and_no_more_than_must() -> None:
    residents = holding(("b", 1, 99), ("a", 1, 10), ("a", 2, 10), ("a", 3, 10))
    assert own(10, None, residents) == []
    assert own(10, 40, residents) == []
    assert own(10, 39, residents) == ["a@1"]
    assert own(10, 30, residents) == ["a@1"]
    assert own(10, 29, residents) == ["a@1", "a@2"]
    assert own(10, 10, residents) == ["a@1", "a@2", "a@3"]


def test_what_is_in_use_can_not_go_for_a_cap_and_what_leaves_still_counts() -> None:
    residents = holding(("a", 1, 10), ("a", 2, 10))
    assert own(10, 25, residents, keys=[]) is None
    assert own(10, 20, residents, keys=[ModelKey("a", 1)]) == ["a@1"]
    assert own(10, 30, residents, leaving=holding(("a", 9, 10))) == ["a@1"]
    assert own(10, 30, residents, leaving=holding(("b", 9, 10))) == []


@pytest.mark.parametrize("size", [11, 1000])
def test_a_model_larger_than_its_tenants_cap_is_named_so(size: int) -> None:
    with pytest.raises(ResidentOverQuota, match=f"takes {size} bytes; tenant a may keep 10"):
        own(size, 10, holding(("a", 1, 10)))
    assert own(10, 10, {}) == []


async def test_a_model_larger_than_its_cap_is_refused_for_good_not_for_now() -> None:
    loader = ScriptedLoader()
    cache = make(loader, bounds_of=lambda tenant: TenantBounds(SIZE - 1, 0), room_timeout_s=60)
    with pytest.raises(ResidentOverQuota, match="takes 8 bytes; tenant acme may keep 7"):
        await cache.lease(version("acme"), 2)
    assert cache.snapshot() == []


async def test_at_its_cap_a_tenant_whose_models_are_in_use_is_told_that() -> None:
    cache = make(ScriptedLoader(), bounds_of=lambda tenant: TenantBounds(SIZE, 0), room_timeout_s=0.01)
    with await cache.lease(version("acme"), 1):
        with pytest.raises(ResidentOverQuota, match="all that tenant acme may keep on a device is in use"):
            await cache.lease(version("acme", 2), 5)
    await use(cache, version("acme", 2))
    assert resident(cache) == {"acme@2"}
    assert [info.state for info in cache.snapshot()] == [State.RESIDENT]
