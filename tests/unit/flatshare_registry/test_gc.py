"""Garbage collection: what it takes, what it spares."""

import pytest

from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, InvalidInput, Unavailable
from flatshare_registry.gc import DEFAULT_GRACE_S, MIN_GRACE_S, collect
from flatshare_registry.ids import PRODUCTION, TenantId
from flatshare_registry.registration import BLOB_REFRESH_S
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
    registry.register(ACME, weights(3), "tiny", SPECS)
    dead = layout.blob_key(registry.version(ACME, 1).digest)
    live = {layout.blob_key(registry.version(ACME, number).digest) for number in (2, 3)}
    registry.delete_version(ACME, 1)
    clock.advance(DEFAULT_GRACE_S + 1)
    report = collect(store, clock=clock)
    assert [meta.key for meta in report.garbage] == [dead]
    assert (report.removed, report.live_blobs, report.spared, blobs(store)) == (False, 2, 0, 3)
    assert report.size_bytes == len(weights(1))
    assert [meta.key for meta in collect(store, remove=True, clock=clock).garbage] == [dead]
    assert {meta.key for meta in store.list(layout.BLOBS)} == live
    assert [registry.version(ACME, number).version for number in (2, 3)] == [2, 3], "their records stay"


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
        if operation == "head":
            store.put(key, weights(1), Overwrite())

    assert collect(FaultyStore(store, before=renew), remove=True, clock=clock).garbage == ()
    assert blobs(store) == 1


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


def test_the_grace_period_is_over_just_after_it_and_the_shortest_is_taken(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    registry.delete_tenant(ACME)
    clock.advance(MIN_GRACE_S)
    report = collect(store, grace_s=MIN_GRACE_S, clock=clock)
    assert (report.garbage, report.spared) == ((), 1), "its last second is part of it"
    clock.advance(0.5)
    assert len(collect(store, grace_s=MIN_GRACE_S, clock=clock).garbage) == 1


def test_records_that_no_head_names_go_and_those_of_others_with_that_number_stay(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    other = TenantId("other")
    registry.create_tenant(other)
    for number in (1, 2):
        registry.register(other, weights(number), "tiny", SPECS)
    record = store.get(layout.version_key(ACME, 1)).data
    stray = layout.version_key(ACME, 2)  # of a registration that was cut short
    store.put(stray, record, Overwrite())
    for strange in ("blobs/README", "tenants/acme/notes.txt"):
        store.put(strange, b"nobody's", Overwrite())
    clock.advance(DEFAULT_GRACE_S + 1)
    before = {meta.key for meta in store.list("")}
    report = collect(store, remove=True, clock=clock)
    assert [meta.key for meta in report.garbage] == [stray]
    assert (report.removed, report.spared, report.live_blobs) == (True, 0, 2)
    assert {meta.key for meta in store.list("")} == before - {stray}, "what it does not know it leaves alone"


def test_what_is_spared_is_counted_beside_what_goes(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    registry.delete_version(ACME, registry.register(ACME, weights(2), "tiny", SPECS).version.version)
    clock.advance(DEFAULT_GRACE_S + 1)
    registry.delete_version(ACME, registry.register(ACME, weights(3), "tiny", SPECS).version.version)
    report = collect(store, remove=True, clock=clock)
    assert (len(report.garbage), report.spared, report.live_blobs, blobs(store)) == (1, 1, 1, 2)


def test_what_somebody_else_removed_meanwhile_is_not_said_to_be_our_doing(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    registry.delete_tenant(ACME)
    clock.advance(DEFAULT_GRACE_S + 1)
    (key,) = [meta.key for meta in store.list(layout.BLOBS)]

    def rival(operation: str, asked: str) -> None:
        if operation == "head":
            store.delete(key)

    report = collect(FaultyStore(store, before=rival), remove=True, clock=clock)
    assert (report.garbage, blobs(store)) == ((), 0)
