"""Garbage collection: what it takes, what it spares."""

import pytest

from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, InvalidInput, Unavailable
from flatshare_registry.gc import DEFAULT_GRACE_S, collect
from flatshare_registry.ids import PRODUCTION, TenantId
from flatshare_registry.registration import BLOB_REFRESH_S
from flatshare_registry.store_clock import MAX_SKEW_S, store_now
from flatshare_registry.stores.base import Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import CrashAtStep, FaultyStore, ManualClock
from flatshare_registry.testing.files import TINY_SPECS as SPECS
from flatshare_registry.testing.files import tiny_weights as weights

ACME = TenantId("acme")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock=clock)


@pytest.fixture
def registry(store: MemoryStore, clock: ManualClock) -> Registry:
    registry = Registry(store, clock=clock)
    registry.create_tenant(ACME)
    registry.register(ACME, weights(1), "tiny", SPECS)
    return registry


def blobs(store: MemoryStore) -> int:
    return len(list(store.list(layout.BLOBS)))


def test_a_dry_run_is_the_default_and_removes_nothing(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    registry.register(ACME, weights(2), "tiny", SPECS, alias=PRODUCTION)
    registry.delete_version(ACME, 1)
    clock.advance(DEFAULT_GRACE_S + 1)
    report = collect(store, clock=clock)
    assert (len(report.garbage), report.removed, report.live_blobs, blobs(store)) == (1, False, 1, 2)
    assert report.size_bytes == len(weights(1))
    assert len(collect(store, remove=True, clock=clock).garbage) == 1
    assert blobs(store) == 1
    assert registry.version(ACME, 2).digest in next(iter(store.list(layout.BLOBS))).key


def test_what_is_young_is_spared(registry: Registry, store: MemoryStore, clock: ManualClock) -> None:
    registry.delete_tenant(ACME)
    clock.advance(DEFAULT_GRACE_S - 1)
    report = collect(store, remove=True, clock=clock)
    assert (report.garbage, report.spared, blobs(store)) == ((), 1, 1)


def test_a_blob_that_another_tenant_names_stays(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    other = TenantId("other")
    registry.create_tenant(other)
    registry.register(other, weights(1), "tiny", SPECS)
    registry.delete_tenant(ACME)
    clock.advance(10 * DEFAULT_GRACE_S)
    assert collect(store, remove=True, clock=clock).garbage == ()
    assert blobs(store) == 1


def test_what_a_crashed_registration_left_is_collected(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    # Writes of a registration: blob, record, the last change's log entry again, head.
    with pytest.raises(Unavailable):
        Registry(FaultyStore(store, before=CrashAtStep(3)), clock=clock).register(
            ACME, weights(9), "tiny", SPECS
        )
    clock.advance(DEFAULT_GRACE_S + 1)
    report = collect(store, remove=True, clock=clock)
    assert {key.partition("/")[0] for key in (meta.key for meta in report.garbage)} == {"blobs", "tenants"}
    assert registry.register(ACME, weights(9), "tiny", SPECS).created


def test_a_reused_old_blob_is_written_again_so_that_gc_cannot_take_it(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    registry.delete_tenant(ACME)
    clock.advance(DEFAULT_GRACE_S + 1)
    registry.create_tenant(ACME)

    def collect_now(operation: str, key: str) -> None:
        if key == layout.head_key(ACME):  # just before the registration becomes visible
            assert collect(store, remove=True, clock=clock).garbage == ()

    racing = Registry(
        FaultyStore(store, before=lambda op, key: collect_now(op, key) if op == "put" else None), clock=clock
    )
    record = racing.register(ACME, weights(1), "tiny", SPECS).version
    assert store.get(layout.blob_key(record.digest)).data == weights(1)


def test_a_blob_renewed_between_listing_and_delete_is_spared(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    registry.delete_tenant(ACME)
    clock.advance(DEFAULT_GRACE_S + 1)
    key = next(iter(store.list(layout.BLOBS))).key

    def renew(operation: str, asked: str) -> None:
        if operation == "head" and asked == key:  # not the look at the store's clock before the listing
            store.put(key, weights(1), Overwrite())

    assert collect(FaultyStore(store, before=renew), remove=True, clock=clock).garbage == ()
    assert blobs(store) == 1


def test_ages_are_counted_by_the_stores_clock(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    registry.delete_tenant(ACME)
    clock.advance(DEFAULT_GRACE_S - 3600)
    a_little_ahead = ManualClock(clock.now_s + MAX_SKEW_S - 1)
    for grace_s in (DEFAULT_GRACE_S - 3600, DEFAULT_GRACE_S - 3600 + MAX_SKEW_S - 10):
        assert collect(store, remove=True, grace_s=grace_s, clock=a_little_ahead).garbage == ()
    assert blobs(store) == 1


@pytest.mark.parametrize("wrong_s", [26 * 3600.0, MAX_SKEW_S + 2, -MAX_SKEW_S - 2, -26 * 3600.0])
def test_with_a_clock_that_is_wrong_nothing_is_garbage(
    registry: Registry, store: MemoryStore, clock: ManualClock, wrong_s: float
) -> None:
    registry.delete_tenant(ACME)
    clock.advance(10 * DEFAULT_GRACE_S)
    with pytest.raises(InvalidInput, match="clock"):
        collect(store, remove=True, clock=ManualClock(clock.now_s + wrong_s))
    assert blobs(store) == 1


def test_a_blob_is_refreshed_by_the_stores_clock_too(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    """A registration whose clock is behind would take an old blob for a fresh one, and gc would take it."""
    registry.delete_tenant(ACME)
    clock.advance(DEFAULT_GRACE_S - 60)
    behind = Registry(store, clock=ManualClock(clock.now_s - (DEFAULT_GRACE_S - 120)))
    behind.create_tenant(ACME)
    digest = behind.register(ACME, weights(1), "tiny", SPECS).version.digest
    assert clock.now_s - store.head(layout.blob_key(digest)).modified_s < 1


def test_reading_the_stores_clock_leaves_nothing_there(store: MemoryStore, clock: ManualClock) -> None:
    assert store_now(store) == clock.now_s
    assert list(store.list("")) == []


def test_a_short_grace_period_is_refused(store: MemoryStore) -> None:
    with pytest.raises(InvalidInput):
        collect(store, grace_s=2 * BLOB_REFRESH_S - 1)


def test_nothing_is_deleted_while_a_head_cannot_be_read(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    registry.delete_tenant(ACME)
    clock.advance(DEFAULT_GRACE_S + 1)
    store.put(layout.head_key(TenantId("zz")), b"damaged", Overwrite())
    with pytest.raises(Corrupt):
        collect(store, remove=True, clock=clock)
    assert blobs(store) == 1
