"""Garbage collection: what it takes, what it spares."""

from collections.abc import Callable

import pytest

from flatshare_registry import layout
from flatshare_registry.blobs import BLOB_REFRESH_S
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, InvalidInput, Unavailable
from flatshare_registry.feed import KEPT_S
from flatshare_registry.gc import DEFAULT_GRACE_S, MIN_GRACE_S, collect
from flatshare_registry.ids import PRODUCTION, TenantId
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
    assert [meta.key.partition("/")[0] for meta in report.garbage] == ["blobs"]
    assert registry.register(ACME, weights(9), "tiny", SPECS).created
    # Its record's number has passed now: nobody can be given it again.
    report = collect(store, remove=True, clock=clock)
    assert [meta.key for meta in report.garbage] == [layout.version_key(ACME, 2)]
    assert [record.version for record in registry.list_versions(ACME)] == [1, 3]


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


class SentTwice(FaultyStore):
    """Deletes and purges are done, and done once more after ``between``: the first answer was lost."""

    between: Callable[[str], None]

    def delete(self, key: str) -> None:
        super().delete(key)
        self.between(key)
        super().delete(key)

    def purge(self, key: str, *, keep_latest: bool = False) -> int:
        gone = super().purge(key, keep_latest=keep_latest)
        self.between(key)
        return gone + super().purge(key, keep_latest=keep_latest)


def test_a_delete_that_is_sent_twice_takes_nothing_from_who_came_meanwhile(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    globex = TenantId("globex")
    registry.create_tenant(globex)
    registry.register(ACME, weights(2), "tiny", SPECS, alias=PRODUCTION)
    registry.delete_version(ACME, 1)
    clock.advance(2 * DEFAULT_GRACE_S)

    def register(key: str) -> None:
        if key.startswith(layout.BLOBS) and not registry.head(globex).versions:
            registry.register(globex, weights(1), "tiny", SPECS)

    twice = SentTwice(store)
    twice.between = register
    report = collect(twice, remove=True, clock=clock)
    assert registry.head(globex).versions, "it came while its blob was going"
    assert store.get(layout.blob_key(registry.version(globex, 1).digest)).data == bytes(weights(1))
    assert report.garbage == ()
    assert list(store.list(layout.HELD)) == []


def test_what_a_gc_that_was_cut_short_had_taken_comes_back(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    """Killed between taking a blob and looking who came to name it: the next one puts it back."""
    globex = TenantId("globex")
    registry.create_tenant(globex)
    registry.register(ACME, weights(2), "tiny", SPECS, alias=PRODUCTION)
    digest = registry.version(ACME, 1).digest
    registry.delete_version(ACME, 1)
    clock.advance(2 * DEFAULT_GRACE_S)

    class Killed(BaseException):
        pass

    def killed(key: str) -> None:
        if key == layout.blob_key(digest):
            raise Killed

    twice = SentTwice(store)
    twice.between = killed
    with pytest.raises(Killed):
        collect(twice, remove=True, clock=clock)
    assert [meta.key for meta in store.list(layout.HELD)] == [f"{layout.HELD}{digest}.safetensors"]
    registry.register(globex, weights(1), "tiny", SPECS)
    store.delete(layout.blob_key(digest))  # the killed one's request, which comes late
    collect(store, remove=True, clock=clock)
    assert store.get(layout.blob_key(digest)).data == bytes(weights(1))
    clock.advance(2 * DEFAULT_GRACE_S)
    collect(store, remove=True, clock=clock)
    assert list(store.list(layout.HELD)) == []
    assert store.get(layout.blob_key(digest)).data == bytes(weights(1))


def test_a_record_whose_number_may_be_given_out_again_is_not_garbage(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    """A registration that died left record 2; the next one may be given that number while gc looks at it."""
    left = layout.version_key(ACME, 2)
    store.put(left, store.get(layout.version_key(ACME, 1)).data, Overwrite())
    clock.advance(2 * DEFAULT_GRACE_S)
    assert collect(store, remove=True, clock=clock).garbage == ()
    registry.register(ACME, weights(3), "tiny", SPECS)  # takes the next number after it
    clock.advance(2 * DEFAULT_GRACE_S)
    assert [meta.key for meta in collect(store, remove=True, clock=clock).garbage] == [left]


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
    registry.register(ACME, weights(1.5), "tiny", SPECS)  # is given the number after it
    for strange in ("blobs/README", "tenants/acme/notes.txt"):
        store.put(strange, b"nobody's", Overwrite())
    clock.advance(DEFAULT_GRACE_S + 1)
    announced = {meta.key for meta in store.list(layout.CHANGES)}
    before = {meta.key for meta in store.list("")} - announced
    report = collect(store, remove=True, clock=clock)
    assert [meta.key for meta in report.garbage] == [stray]
    assert (report.removed, report.spared, report.live_blobs) == (True, 0, 3)
    assert report.announcements == len(announced) > 0
    assert {meta.key for meta in store.list("")} == before - {stray}, "what it does not know it leaves alone"


def test_announcements_go_when_nobody_can_look_for_them_any_more(
    registry: Registry, store: MemoryStore, clock: ManualClock
) -> None:
    old = {meta.key for meta in store.list(layout.CHANGES)}
    clock.advance(KEPT_S + 1)
    registry.create_tenant(TenantId("young"))
    before = {meta.key for meta in store.list("")}
    assert collect(store, clock=clock).announcements == len(old) > 0
    assert {meta.key for meta in store.list("")} == before, "a dry run"
    assert collect(store, remove=True, clock=clock).announcements == len(old)
    (young,) = store.list(layout.CHANGES)
    clock.advance(KEPT_S)
    assert collect(store, remove=True, clock=clock).announcements == 0
    assert list(store.list(layout.CHANGES)) == [young], "an hour is kept whole"


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
