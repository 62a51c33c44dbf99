"""Registrations that lose their tenant on the way, and weights that several tenants have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flatshare_registry import Registry, TenantId, layout
from flatshare_registry.blobs import BLOB_REFRESH_S
from flatshare_registry.errors import Corrupt, InvalidInput, NotFound
from flatshare_registry.ids import ModelRef
from flatshare_registry.registration import MAX_METADATA_CHARS
from flatshare_registry.stores.base import Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore, ManualClock
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights
from flatshare_registry.weights import describe

ACME, GLOBEX = TenantId("acme"), TenantId("globex")
WEIGHTS = tiny_weights(9.0)
BLOB = layout.blob_key(describe(WEIGHTS).digest)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def registry(store: MemoryStore) -> Registry:
    registry = Registry(store)
    for tenant in (ACME, GLOBEX):
        registry.create_tenant(tenant)
    return registry


def register(registry: Registry, tenant: TenantId = ACME, weights: bytes = WEIGHTS) -> int:
    return registry.register(tenant, weights, "tiny", TINY_SPECS).version.version


def left(store: MemoryStore) -> set[str]:
    """All objects but audit logs, plans and heads."""
    return {
        meta.key for meta in store.list("") if "/versions/" in meta.key or meta.key.startswith(layout.BLOBS)
    }


def ends(registry: Registry, how: str) -> None:
    if how == "erased":
        registry.eraser.begin(ACME)
    else:
        registry.delete_tenant(ACME)


def losing(store: MemoryStore, registry: Registry, how: str, at: str) -> Registry:
    """A registry through which acme ends just before it writes this object, once."""
    done: list[str] = []

    def before(operation: str, key: str) -> None:
        if operation == "put" and key == at and not done:
            done.append(key)
            ends(registry, how)

    return Registry(FaultyStore(store, before=before))


STEPS = {"blob": BLOB, "record": layout.version_key(ACME, 1), "head": layout.head_key(ACME)}


@pytest.mark.parametrize("how", ["erased", "deleted"])
@pytest.mark.parametrize("step", STEPS)
def test_a_registration_that_loses_its_tenant_leaves_nothing_of_its_own(
    store: MemoryStore, registry: Registry, how: str, step: str
) -> None:
    """Looked at before any erasure goes on: it may have been through already."""
    with pytest.raises(NotFound, match="acme"):
        register(losing(store, registry, how, STEPS[step]))
    assert left(store) == set()


@pytest.mark.parametrize("how", ["erased", "deleted"])
@pytest.mark.parametrize("step", STEPS)
def test_a_registration_that_loses_its_tenant_leaves_anothers_weights(
    store: MemoryStore, registry: Registry, how: str, step: str
) -> None:
    number = register(registry, GLOBEX)
    at = STEPS["record" if step == "blob" else step]
    with pytest.raises(NotFound, match="acme"):
        register(losing(store, registry, how, at))
    assert left(store) == {BLOB, layout.version_key(GLOBEX, number)}
    assert store.get(BLOB).data == WEIGHTS


def test_a_tenant_that_is_gone_when_the_weights_are_there_already_leaves_them(
    store: MemoryStore, registry: Registry
) -> None:
    """It ends between the look at its head and the claim of a number."""
    number = register(registry, GLOBEX)
    seen: list[str] = []

    def after(operation: str, key: str) -> None:
        if operation == "get" and key == layout.head_key(ACME):
            seen.append(key)
            if len(seen) == 1:
                registry.eraser.begin(ACME)

    with pytest.raises(NotFound):
        register(Registry(FaultyStore(store, after=after)))
    assert left(store) == {BLOB, layout.version_key(GLOBEX, number)}


def test_weights_that_another_tenant_registered_meanwhile_outlive_the_registration_that_put_them_there(
    store: MemoryStore, registry: Registry
) -> None:
    """Globex comes to name what acme put there, and is done, before acme's registration loses its tenant."""
    rival: list[int] = []

    def before(operation: str, key: str) -> None:
        if operation == "put" and key == STEPS["record"] and not rival:
            rival.append(register(registry, GLOBEX))
            registry.eraser.begin(ACME)

    with pytest.raises(NotFound, match="acme"):
        register(Registry(FaultyStore(store, before=before)))
    assert left(store) == {BLOB, layout.version_key(GLOBEX, rival[0])}


def test_weights_that_were_lost_come_back_with_the_next_registration_of_them(
    store: MemoryStore, registry: Registry
) -> None:
    register(registry)
    store.delete(BLOB)
    again = registry.register(ACME, WEIGHTS, "tiny", TINY_SPECS)
    assert (again.created, again.version.version) == (False, 1)
    assert store.get(BLOB).data == WEIGHTS


def test_the_same_weights_of_another_architecture_are_another_version(registry: Registry) -> None:
    register(registry)
    other = registry.register(ACME, WEIGHTS, "another", TINY_SPECS)
    assert (other.created, other.version.version, other.version.architecture) == (True, 2, "another")
    assert registry.register(ACME, WEIGHTS, "another", TINY_SPECS).created is False


@pytest.mark.parametrize(("age_s", "renewed"), [(BLOB_REFRESH_S, False), (BLOB_REFRESH_S + 1, True)])
def test_weights_that_lay_there_long_are_written_again_so_that_no_collection_takes_them(
    age_s: float, renewed: bool
) -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    registry = Registry(store, clock=clock)
    for tenant in (ACME, GLOBEX):
        registry.create_tenant(tenant)
    register(registry)
    clock.advance(age_s)
    register(registry, GLOBEX)
    assert store.head(BLOB).modified_s == clock() - (0 if renewed else age_s)


def test_a_versions_notes_have_a_limit_all_together(store: MemoryStore, registry: Registry) -> None:
    half = MAX_METADATA_CHARS // 2
    before = left(store)
    for notes in (
        {"k": "v" * MAX_METADATA_CHARS},
        {"a" * half: "b" * half, "c": ""},
        {"a": "x" * half, "b": "y" * half},
    ):
        with pytest.raises(InvalidInput, match="metadata is longer than 4096"):
            registry.register(ACME, WEIGHTS, "tiny", TINY_SPECS, metadata=notes)
    assert left(store) == before
    most = {"k": "v" * (MAX_METADATA_CHARS - 1)}
    assert registry.register(ACME, WEIGHTS, "tiny", TINY_SPECS, metadata=most).version.metadata == most


READS: dict[str, Callable[[Registry], object]] = {
    "head": lambda registry: registry.head(ACME),
    "head unless": lambda registry: registry.head_unless(ACME, None),
    "resolve": lambda registry: registry.resolve(ModelRef.parse("acme")),
    "version": lambda registry: registry.version(ACME, 1),
    "change": lambda registry: registry.tenancy.create_key(ACME),
    "register": lambda registry: register(registry, ACME, tiny_weights(4.0)),
}


@pytest.mark.parametrize("read", READS)
def test_another_tenants_head_in_ones_place_is_never_believed(
    store: MemoryStore, registry: Registry, read: str
) -> None:
    """A bucket that was copied wrongly: all of globex's names, keys and limits would be acme's."""
    for tenant in (ACME, GLOBEX):
        register(registry, tenant)
    theirs = store.get(layout.head_key(GLOBEX)).data
    store.put(layout.head_key(ACME), theirs, Overwrite())
    before = left(store)
    with pytest.raises(Corrupt, match="the head of another tenant"):
        READS[read](registry)
    assert left(store) == before
    assert store.get(layout.head_key(ACME)).data == theirs


@pytest.mark.parametrize("tenant", [ACME, GLOBEX])
@pytest.mark.parametrize("number", [1, 2])
def test_another_versions_record_in_ones_place_is_never_believed(
    store: MemoryStore, registry: Registry, tenant: TenantId, number: int
) -> None:
    for value in (1.0, 2.0):
        register(registry, ACME, tiny_weights(value))
        register(registry, GLOBEX, tiny_weights(value))
    if (tenant, number) == (ACME, 1):
        assert registry.version(ACME, 1).name == "acme@1"
        return
    store.put(layout.version_key(ACME, 1), store.get(layout.version_key(tenant, number)).data, Overwrite())
    with pytest.raises(Corrupt, match="does not describe the version"):
        registry.version(ACME, 1)


def test_a_head_is_read_only_where_it_is_another_than_the_one_that_is_known(
    store: MemoryStore, registry: Registry
) -> None:
    answer = registry.head_unless(ACME, None)
    assert answer is not None
    head, etag = answer
    assert head == registry.head(ACME)
    assert registry.head_unless(ACME, etag) is None
    registry.tenancy.create_key(ACME)
    again = registry.head_unless(ACME, etag)
    assert again is not None and again[0].revision == head.revision + 1 and again[1] != etag
    registry.delete_tenant(ACME)
    for known in (None, etag, again[1]):
        with pytest.raises(NotFound, match="no tenant acme"):
            registry.head_unless(ACME, known)


def test_changes_are_told_newest_first_and_each_once(registry: Registry) -> None:
    for _ in range(3):
        registry.tenancy.create_key(ACME)
    told = [entry.revision for entry in registry._heads.newest_first(ACME, registry.head(ACME))]
    assert told == sorted(told, reverse=True) == list(range(told[0], 0, -1))
