"""Quotas: rates, counts, and that a change of the head changes them at once."""

from __future__ import annotations

import contextlib

import pytest

from flatshare.engine.quotas import COLD_BURST, FREE_BYTES, BytesLimit, QuotaKeeper
from flatshare.errors import (
    Overloaded,
    TooManyAtOnce,
    TooManyBytesAtOnce,
    TooManyColdLoads,
    TooManyRequests,
)
from flatshare_registry import Quotas, Registry, TenantId
from flatshare_registry.records import TenantHead
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(0.0)


@pytest.fixture
def registry() -> Registry:
    registry = Registry(MemoryStore())
    for tenant in ("acme", "globex"):
        registry.create_tenant(TenantId(tenant))
    return registry


def head(registry: Registry, tenant: str = "acme", plan: str | None = None, **quotas: float) -> TenantHead:
    return registry.tenancy.set_quotas(TenantId(tenant), Quotas.model_validate(quotas), plan=plan)


def test_one_tenant_has_a_part_of_the_places_where_nobody_said_how_many(registry: Registry) -> None:
    keeper = QuotaKeeper(
        {"default": Quotas(burst=5), "big": Quotas(concurrent_requests=3)}, concurrent_requests=2
    )
    for plan, most in (("default", 2), ("big", 3)):
        of = head(registry, plan=plan)
        with contextlib.ExitStack() as under_way:
            for _ in range(most):
                under_way.enter_context(keeper.request(of))
            with pytest.raises(TooManyAtOnce, match=f"has {most} requests"):
                keeper.request(of)
    assert keeper.limits(head(registry, concurrent_requests=7)).concurrent_requests == 7


def allowed(keeper: QuotaKeeper, of: TenantHead, tries: int) -> int:
    done = 0
    for _ in range(tries):
        try:
            with keeper.request(of):
                done += 1
        except TooManyRequests:
            pass
    return done


def test_a_rate_is_a_bucket_that_starts_full(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, requests_per_s=10, burst=4)
    assert allowed(keeper, acme, 100) == 4
    clock.advance(0.25)
    assert allowed(keeper, acme, 100) == 2
    clock.advance(1000)
    assert allowed(keeper, acme, 100) == 4, "it holds no more than the burst"
    assert allowed(keeper, head(registry, "globex"), 100) == 100, "another tenant's account is another"
    with pytest.raises(TooManyRequests, match="acme sends more than 10") as caught:
        keeper.request(acme)
    assert caught.value.retry_after_s == 1
    slow = head(registry, requests_per_s=0.1)
    assert allowed(keeper, slow, 10) == 1, "at least one, however low the rate"
    with pytest.raises(TooManyRequests) as caught:
        keeper.request(slow)
    assert caught.value.retry_after_s == 11


def test_over_ten_seconds_a_tenant_gets_its_rate_and_not_more(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, requests_per_s=50, burst=10)
    done = 0
    for _ in range(1000):  # 100 tries a second
        done += allowed(keeper, acme, 1)
        clock.advance(0.01)
    assert 500 <= done <= 510


def test_requests_under_way_are_counted_until_they_end(registry: Registry) -> None:
    keeper = QuotaKeeper()
    acme = head(registry, concurrent_requests=2)
    first, second = keeper.request(acme), keeper.request(acme)
    with pytest.raises(TooManyAtOnce):
        keeper.request(acme)
    more = head(registry, concurrent_requests=3)
    third = keeper.request(more)
    with pytest.raises(TooManyAtOnce):
        keeper.request(more)
    for one in (first, second, third):
        one.__exit__(None, None, None)
    with keeper.request(acme), keeper.request(acme):
        pass


def test_a_failing_request_is_over_too(registry: Registry) -> None:
    keeper = QuotaKeeper()
    acme = head(registry, concurrent_requests=1)
    for _ in range(3):
        with pytest.raises(ValueError, match="x"), keeper.request(acme):
            raise ValueError("x")


def test_cold_loads_have_a_rate_a_minute(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, cold_loads_per_min=60)
    for _ in range(COLD_BURST):
        keeper.cold_load(acme)
    with pytest.raises(TooManyColdLoads, match="60 models a minute"):
        keeper.cold_load(acme)
    clock.advance(1)
    keeper.cold_load(acme)
    with pytest.raises(TooManyColdLoads):
        keeper.cold_load(acme)  # one in a second, not more


def test_what_a_plan_says_holds_where_the_tenant_has_nothing_of_its_own(registry: Registry) -> None:
    plans = {"default": Quotas(rows_per_request=8), "gold": Quotas(rows_per_request=64, resident_bytes=100)}
    keeper = QuotaKeeper(plans)
    assert keeper.limits(head(registry)).rows_per_request == 8
    gold = head(registry, plan="gold", resident_floor_bytes=10)
    assert keeper.limits(gold).rows_per_request == 64
    assert (keeper.bounds(gold).cap_bytes, keeper.bounds(gold).floor_bytes) == (100, 10)
    assert keeper.limits(head(registry, plan="unknown here")).rows_per_request == 8
    assert keeper.bounds(None).cap_bytes is None


def test_other_changes_of_the_head_do_not_fill_the_bucket(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, requests_per_s=1, burst=2)
    assert allowed(keeper, acme, 5) == 2
    registry.tenancy.create_key(TenantId("acme"))
    assert allowed(keeper, registry.head(TenantId("acme")), 5) == 0
    assert allowed(keeper, head(registry, requests_per_s=1, burst=3), 5) == 3, "a new limit holds at once"


def test_bodies_are_counted_while_they_are_held(registry: Registry) -> None:
    """Not the first 64 KiB of a request: a replica's places full of such requests hold little."""
    kib = 1024
    keeper = QuotaKeeper(bytes_limit=BytesLimit(replica=400 * kib, tenant=200 * kib))
    one, two, other = (keeper.request(head(registry, tenant)) for tenant in ("acme", "acme", "globex"))
    one.hold_bytes(64 * kib)
    assert keeper.held_bytes == 0
    one.hold_bytes(264 * kib)
    assert keeper.held_bytes == 200 * kib
    with pytest.raises(TooManyBytesAtOnce):
        two.hold_bytes(65 * kib)
    with pytest.raises(TooManyBytesAtOnce):
        one.hold_more(1)
    other.hold_bytes(264 * kib)
    third = keeper.request(registry.create_tenant(TenantId("initech")))
    with pytest.raises(Overloaded):
        third.hold_bytes(65 * kib)
    one.hold_bytes(164 * kib)  # a line of a stream went on
    two.hold_bytes(164 * kib)
    assert keeper.held_bytes == 400 * kib
    for under_way in (one, two, other, third):
        with under_way:
            pass
    assert keeper.held_bytes == 0
    with keeper.request(head(registry, "acme")) as again:
        again.hold_bytes(264 * kib)


def test_a_line_of_a_stream_takes_a_place_of_its_tenants(registry: Registry) -> None:
    keeper = QuotaKeeper(concurrent_requests=2)
    stream = keeper.request(head(registry, "acme"))
    line = keeper.place(head(registry, "acme"))
    assert line is not None
    assert keeper.place(head(registry, "acme")) is None
    with pytest.raises(TooManyAtOnce):
        keeper.request(head(registry, "acme"))
    assert keeper.place(head(registry, "globex")) is not None
    with line:
        pass
    assert keeper.place(head(registry, "acme")) is not None
    with stream:
        pass


def test_cold_loads_refill_at_their_rate_and_say_when_to_come_back(
    registry: Registry, clock: ManualClock
) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, cold_loads_per_min=6)  # one in ten seconds, and six at once
    for _ in range(6):
        keeper.cold_load(acme)
    with pytest.raises(TooManyColdLoads, match="6 models a minute") as caught:
        keeper.cold_load(acme)
    assert caught.value.retry_after_s in (10, 11)
    clock.advance(caught.value.retry_after_s)
    keeper.cold_load(acme)
    with pytest.raises(TooManyColdLoads):
        keeper.cold_load(acme)
    clock.advance(8.5)
    with pytest.raises(TooManyColdLoads) as caught:
        keeper.cold_load(acme)
    assert caught.value.retry_after_s == 1
    clock.advance(3600)
    for _ in range(6):
        keeper.cold_load(acme)
    with pytest.raises(TooManyColdLoads):
        keeper.cold_load(acme)


@pytest.mark.parametrize("rate", [0.5, 1, 3, 60, 1000])
def test_who_comes_back_when_told_is_let_in(registry: Registry, clock: ManualClock, rate: float) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, cold_loads_per_min=rate, requests_per_s=rate, burst=1)
    for take in (keeper.cold_load, keeper.request):
        refusal = None
        for _ in range(COLD_BURST + 1):
            try:
                take(acme)
            except (TooManyColdLoads, TooManyRequests) as error:
                refusal = error
                break
        assert refusal is not None and refusal.retry_after_s is not None
        assert refusal.retry_after_s >= 1, "never 'at once', never a time that is past"
        clock.advance(refusal.retry_after_s)
        take(acme)


def test_a_tenant_without_a_rate_is_never_refused(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry)
    for _ in range(1000):
        keeper.cold_load(acme)
        keeper.request(acme)
    assert keeper.refused == 0


def test_a_slow_rate_of_cold_loads_allows_one(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, cold_loads_per_min=0.5)
    keeper.cold_load(acme)
    with pytest.raises(TooManyColdLoads) as caught:
        keeper.cold_load(acme)
    assert caught.value.retry_after_s in (120, 121)


def test_each_refusal_is_counted_once_and_takes_nothing(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, requests_per_s=1, burst=2, concurrent_requests=1, cold_loads_per_min=1)
    keeper.cold_load(acme)
    with keeper.request(acme):
        with pytest.raises(TooManyAtOnce):
            keeper.request(acme)
    with keeper.request(acme):
        pass  # the refused one took no token
    with pytest.raises(TooManyRequests):
        keeper.request(acme)
    with pytest.raises(TooManyColdLoads):
        keeper.cold_load(acme)
    assert keeper.refused == 3
    clock.advance(1)
    with keeper.request(acme):
        pass  # the refused one was not under way


def test_ending_a_request_twice_frees_one_place(registry: Registry) -> None:
    keeper = QuotaKeeper()
    acme = head(registry, concurrent_requests=2)
    first, _ = keeper.request(acme), keeper.request(acme)
    for _ in range(3):
        first.__exit__(None, None, None)
    keeper.request(acme)
    with pytest.raises(TooManyAtOnce):
        keeper.request(acme)


def test_a_part_of_a_request_counts_for_the_rate_only(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    acme = head(registry, concurrent_requests=1, requests_per_s=1, burst=3)
    with keeper.request(acme):
        for _ in range(2):
            with keeper.request(acme, counted=False):
                pass
        with pytest.raises(TooManyRequests):
            keeper.request(acme, counted=False)
        clock.advance(1)
        with pytest.raises(TooManyAtOnce):
            keeper.request(acme)


def test_a_request_that_came_before_a_change_does_not_undo_it(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper(clock=clock)
    before = head(registry, requests_per_s=1, burst=50, rows_per_request=9)
    after = head(registry, requests_per_s=1, burst=2, rows_per_request=4)
    assert allowed(keeper, after, 5) == 2
    assert allowed(keeper, before, 5) == 0
    assert keeper.limits(before).rows_per_request == 4


def test_other_plans_hold_from_the_next_request_on(registry: Registry, clock: ManualClock) -> None:
    keeper = QuotaKeeper({"gold": Quotas(requests_per_s=2)}, clock, concurrent_requests=5)
    of = head(registry, plan="gold")
    with keeper.request(of) as under_way:
        under_way.hold_bytes(100_000 + FREE_BYTES)
        keeper.change(
            {"gold": Quotas(requests_per_s=4)}, concurrent_requests=1, bytes_limit=BytesLimit(tenant=150_000)
        )
        assert keeper.held_bytes == 100_000, "what is under way goes on counting"
        with pytest.raises(TooManyAtOnce):
            keeper.request(of)
        with pytest.raises(TooManyBytesAtOnce):
            under_way.hold_bytes(200_000 + FREE_BYTES)
    assert keeper.held_bytes == 0
    assert allowed(keeper, of, 10) == 4
    keeper.change({"gold": Quotas(requests_per_s=4)}, concurrent_requests=1, bytes_limit=BytesLimit())
    assert allowed(keeper, of, 10) == 0, "a change that changes nothing of it fills no bucket"
