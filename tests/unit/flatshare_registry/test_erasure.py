"""Erasure in the store: what is the tenant's alone goes, whatever crashes on the way."""

from __future__ import annotations

from collections import Counter

import boto3
import pytest

from flatshare_registry import Registry, TenantId, layout
from flatshare_registry.erasure import StoreErasure
from flatshare_registry.errors import AlreadyExists, Corrupt, NotFound, Unavailable
from flatshare_registry.ids import AliasName, ModelRef
from flatshare_registry.records import TenantState
from flatshare_registry.stores.base import Create, Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.stores.s3 import S3Options, S3Store, make_s3_client
from flatshare_registry.testing.faults import CrashAtStep, FaultyStore
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights
from flatshare_registry.weights import describe

ACME, GLOBEX = TenantId("acme"), TenantId("globex")


def filled(store: MemoryStore | S3Store) -> Registry:
    """Acme with three versions, one deleted, one that globex has too."""
    registry = Registry(store)
    for tenant in (ACME, GLOBEX):
        registry.create_tenant(tenant)
    for value in (1.0, 2.0, 3.0):
        registry.register(ACME, tiny_weights(value), "tiny", TINY_SPECS)
    registry.register(GLOBEX, tiny_weights(2.0), "tiny", TINY_SPECS)
    registry.delete_version(ACME, 3)
    made = registry.tenancy.create_key(ACME)
    store.put(layout.used_key(ACME, made.id), b'{"used_at": 1}', Create())
    registry.pins.add(ModelRef.parse("acme@1"))
    return registry


def erase(registry: Registry) -> StoreErasure:
    leaving = registry.eraser.begin(ACME)
    done = registry.eraser.remove(leaving)
    registry.eraser.finish(leaving)
    return done


def left(registry: Registry) -> set[str]:
    """What is there, but for audit logs, and announcements of changes, which name a tenant's id for an hour."""
    keys = {meta.key for meta in registry.store.list("") if not meta.key.startswith(layout.CHANGES)}
    return {key for key in keys if "/log/" not in key}


def check_erased(registry: Registry) -> None:
    shared = registry.version(GLOBEX, 1)
    assert left(registry) == {
        layout.head_key(ACME), layout.head_key(GLOBEX), layout.version_key(GLOBEX, 1), layout.blob_key(shared.digest),
    }  # fmt: skip
    with pytest.raises(NotFound):
        registry.head(ACME)
    with pytest.raises(AlreadyExists, match="erased"):
        registry.create_tenant(ACME)
    assert registry.last_entry(ACME).action == "tenant.erased"
    assert registry.verify_audit(ACME) == []


def test_what_is_the_tenants_alone_goes_and_what_is_shared_stays() -> None:
    registry = filled(MemoryStore())
    leaving = registry.eraser.begin(ACME)
    assert [number for number, _ in leaving.versions] == [1, 2]
    assert len(leaving.blobs) == 3, "the deleted version's too"
    assert leaving.link == registry.last_entry(ACME).link
    assert len(leaving.tensors) == 3, "also of the deleted version: it may lie on a node"
    assert registry.eraser.begin(ACME) == leaving
    gone = registry.eraser.remove(leaving)
    assert registry.eraser.begin(ACME).tensors == leaving.tensors, "a rerun knows what is gone already"
    registry.eraser.finish(leaving)
    assert (len(gone.removed_blobs), len(gone.kept_blobs)) == (2, 1)
    check_erased(registry)
    again = erase(registry)
    assert again.objects == 0


def test_from_the_tombstone_on_nobody_resolves_it() -> None:
    registry = filled(MemoryStore())
    registry.eraser.begin(ACME)
    for ask in (
        lambda: registry.head(ACME),
        lambda: registry.head_unless(ACME, None),
        lambda: registry.set_alias(ACME, AliasName("canary"), 1),
        lambda: registry.tenancy.resume(ACME),
        lambda: registry.tenancy.create_key(ACME),
        lambda: registry.register(ACME, tiny_weights(9.0), "tiny", TINY_SPECS),
    ):
        with pytest.raises(NotFound):
            ask()
    with pytest.raises(NotFound):
        registry.eraser.begin(TenantId("nobody"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_step_is_finished_by_a_rerun(when: str) -> None:
    for step in range(60):
        store = MemoryStore()
        registry = filled(store)
        crash = CrashAtStep(step)
        faulty = FaultyStore(store, **{when: crash})
        try:
            erase(Registry(faulty))
        except Unavailable:
            pass
        if not crash.crashed:
            assert step > 6, "it takes several writes"
            return
        assert store.get(layout.blob_key(registry.version(GLOBEX, 1).digest)).data == tiny_weights(2.0)
        erase(registry)
        check_erased(registry)
    raise AssertionError("it never ended")


def test_a_registration_that_meets_the_erasure_keeps_its_weights() -> None:
    """Globex registers acme's weights after they were found to be nobody else's, before they go."""
    store = MemoryStore()
    registry = filled(store)
    registered: list[int] = []

    def meet(operation: str, key: str) -> None:
        if operation == "delete" and key.startswith("blobs/") and not registered:
            registered.append(
                registry.register(GLOBEX, tiny_weights(1.0), "tiny", TINY_SPECS).version.version
            )

    leaving = registry.eraser.begin(ACME)
    Registry(FaultyStore(store, before=meet)).eraser.remove(leaving)
    record = registry.version(GLOBEX, registered[0])
    assert store.get(layout.blob_key(record.digest)).data == tiny_weights(1.0)


def test_heads_that_did_not_change_are_read_once() -> None:
    store = MemoryStore()
    registry = filled(store)
    others = [GLOBEX, *(TenantId(f"tenant-{number}") for number in range(20))]
    for other in others[1:]:
        registry.create_tenant(other)
    read: Counter[str] = Counter()

    def count(operation: str, key: str) -> None:
        if operation == "get" and key.endswith("/head.json"):
            read[key] += 1

    leaving = registry.eraser.begin(ACME)
    Registry(FaultyStore(store, before=count)).eraser.remove(leaving)
    assert {read[layout.head_key(other)] for other in others} == {1}
    assert layout.blob_key(registry.version(GLOBEX, 1).digest) in left(registry)


@pytest.mark.parametrize("rerun", [True, False])
def test_weights_that_were_registered_meanwhile_survive_a_crash_too(rerun: bool) -> None:
    """Globex registers acme's weights, the blob goes, and the eraser dies before it could put it back."""
    store = MemoryStore()
    registry = filled(store)
    digest = registry.version(ACME, 1).digest

    def meet_and_die(operation: str, key: str) -> None:
        if (operation, key) == ("delete", layout.blob_key(digest)) and len(
            registry.head(GLOBEX).versions
        ) == 1:
            registry.register(GLOBEX, tiny_weights(1.0), "tiny", TINY_SPECS)

    def die(operation: str, key: str) -> None:
        if (operation, key) == ("delete", layout.blob_key(digest)) and rerun:
            raise Unavailable("killed")

    leaving = registry.eraser.begin(ACME)
    eraser = Registry(FaultyStore(store, before=meet_and_die, after=die)).eraser
    if rerun:
        with pytest.raises(Unavailable):
            eraser.remove(leaving)
        with pytest.raises(NotFound):
            store.head(layout.blob_key(digest))
        done = registry.eraser.remove(registry.eraser.begin(ACME))
    else:
        done = eraser.remove(leaving)
    assert store.get(layout.blob_key(digest)).data == tiny_weights(1.0)
    assert digest in done.kept_blobs and digest not in done.removed_blobs
    assert list(store.list(layout.erasure_held_prefix(ACME))) == []


def test_a_tensor_has_a_reason_to_stay_only_where_another_tenant_has_it() -> None:
    registry = filled(MemoryStore())
    shared = {one.sha256 for one in registry.version(GLOBEX, 1).tensors}
    own = {one.sha256 for one in registry.version(ACME, 1).tensors}
    assert registry.eraser.unnamed_tensors(ACME, own | shared) == own - shared
    assert registry.eraser.unnamed_tensors(GLOBEX, own | shared) == set(), "acme has all of them"


def test_other_tenants_records_are_read_only_until_all_tensors_are_accounted_for() -> None:
    store = MemoryStore()
    registry = filled(store)
    for number in range(5):
        tenant = TenantId(f"other-{number}")
        registry.create_tenant(tenant)
        registry.register(tenant, tiny_weights(2.0), "tiny", TINY_SPECS)
    read: list[str] = []
    eraser = Registry(FaultyStore(store, before=lambda operation, key: read.append(operation))).eraser
    shared = {one.sha256 for one in registry.version(GLOBEX, 1).tensors}
    assert eraser.unnamed_tensors(ACME, set()) == set()
    assert read.count("get") == 0
    assert eraser.unnamed_tensors(ACME, shared) == set()
    assert read.count("get") == 1, "the first has all of them"


def test_a_deleted_tenant_can_be_erased_too() -> None:
    registry = filled(MemoryStore())
    registry.delete_tenant(ACME)
    assert len(erase(registry).removed_blobs) == 2
    check_erased(registry)


def test_a_bucket_with_versioning_keeps_nothing(s3_url: str) -> None:
    client = boto3.client("s3", endpoint_url=s3_url)
    client.create_bucket(Bucket="versioned")
    client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    options = S3Options(endpoint_url=s3_url)
    store = S3Store(make_s3_client(options), "versioned", "p", options)
    registry = filled(store)
    key = layout.blob_key(registry.version(ACME, 1).digest)
    store.put(key, tiny_weights(1.0), Overwrite())
    store.delete(layout.version_key(ACME, 1))  # hidden, not gone

    def objects() -> list[str]:
        found = client.list_object_versions(Bucket="versioned")
        return [
            one["Key"].removeprefix("p/")
            for one in [*found.get("Versions", []), *found.get("DeleteMarkers", [])]
        ]

    def versions() -> Counter[str]:
        """Without marks of deletion, and without what the store writes to tell the time."""
        found = client.list_object_versions(Bucket="versioned")["Versions"]
        return Counter(
            one["Key"].removeprefix("p/")
            for one in found
            if not one["Key"].startswith(("p/clock/", "p/checks/"))
        )

    assert objects().count(key) == 2
    leaving = registry.eraser.begin(ACME)
    before = versions()
    assert before[layout.head_key(ACME)] > 1, "earlier states of the head"
    done = registry.eraser.remove(leaving)
    assert done.objects == (before - versions()).total()
    kept = [one for one in objects() if one.startswith("tenants/acme/") and "/log/" not in one]
    assert kept == [layout.head_key(ACME)], "also what plain deletes had only hidden"
    assert not [one for one in objects() if one == key]
    head, _ = registry._heads._read_any(ACME)
    assert (head.state, head.keys, head.aliases) == (TenantState.ERASED, {}, {})


@pytest.mark.parametrize("weights", [tiny_weights(9.0), tiny_weights(8.0)], ids=["its own", "globex's too"])
def test_a_registration_that_loses_its_tenant_leaves_nothing(weights: bytes) -> None:
    store = MemoryStore()
    registry = filled(store)
    if weights == tiny_weights(8.0):
        registry.register(GLOBEX, weights, "tiny", TINY_SPECS)

    def bury(operation: str, key: str) -> None:
        if operation == "put" and key == layout.version_key(ACME, 4):
            registry.eraser.begin(ACME)

    before = left(registry)
    with pytest.raises(NotFound):
        Registry(FaultyStore(store, before=bury)).register(ACME, weights, "tiny", TINY_SPECS)
    assert left(registry) == before | {layout.erasure_plan_key(ACME)}, "before an erasure goes on"
    erase(registry)
    if weights == tiny_weights(8.0):
        assert store.get(layout.blob_key(registry.version(GLOBEX, 2).digest)).data == weights
        registry.delete_version(GLOBEX, 2)
        store.delete(layout.version_key(GLOBEX, 2))
        store.delete(layout.blob_key(describe(weights).digest))
    check_erased(registry)


def test_what_replicas_noted_while_the_store_was_being_erased_goes_at_the_end() -> None:
    store = MemoryStore()
    registry = filled(store)
    leaving = registry.eraser.begin(ACME)
    registry.eraser.remove(leaving)
    store.put(layout.used_key(ACME, "late"), b'{"used_at": 2}', Create())
    store.put(f"{layout.pins_prefix(ACME)}late.json", b"{}", Create())
    store.put(layout.used_key(GLOBEX, "other"), b'{"used_at": 2}', Create())
    registry.eraser.finish(leaving)
    store.delete(layout.used_key(GLOBEX, "other"))  # there, or this would say so
    check_erased(registry)


def test_weights_that_went_while_another_tenant_came_to_name_them_are_put_back() -> None:
    """Globex finds the blob there; then acme's erasure takes it; then globex's head names it."""
    store = MemoryStore()
    registry = filled(store)

    def take(operation: str, key: str) -> None:
        if operation == "put" and key == layout.version_key(GLOBEX, 2):
            erase(registry)

    record = (
        Registry(FaultyStore(store, before=take))
        .register(GLOBEX, tiny_weights(1.0), "tiny", TINY_SPECS)
        .version
    )
    assert store.get(layout.blob_key(record.digest)).data == tiny_weights(1.0)


def test_an_erasure_tells_how_far_it_is_and_what_went() -> None:
    store = MemoryStore()
    registry = filled(store)
    steps: list[tuple[int, int]] = []
    leaving = registry.eraser.begin(ACME)
    before = left(registry)
    done = registry.eraser.remove(leaving, lambda now, all_: steps.append((now, all_)))
    assert steps == [(1, 3), (2, 3), (3, 3)], (
        "one for each blob that goes, one for the rest, of as many all along"
    )
    gone = before - left(registry)
    assert done.objects == len(gone) > 4
    assert {key for key in gone if key.startswith(layout.BLOBS)} == {
        layout.blob_key(one) for one in done.removed_blobs
    }
    assert set(done.removed_blobs) | set(done.kept_blobs) == set(leaving.blobs)


def test_a_plan_that_can_not_be_read_stops_an_erasure_rather_than_to_leave_something() -> None:
    for plan in (b"{", b"{}", b"[]", b'{"versions": 1, "tensors": []}'):
        registry = filled(MemoryStore())
        registry.store.put(layout.erasure_plan_key(ACME), plan, Overwrite())
        with pytest.raises(Corrupt, match="the plan of the erasure of acme"):
            registry.eraser.begin(ACME)
        assert layout.version_key(ACME, 1) in left(registry)


def test_records_that_no_head_names_or_nobody_can_read_go_too() -> None:
    store = MemoryStore()
    registry = filled(store)
    other = tiny_weights(7.0)
    made = registry.register(ACME, other, "tiny", TINY_SPECS).version
    record = store.get(layout.version_key(ACME, made.version)).data
    registry.delete_version(ACME, made.version)
    store.put(layout.version_key(ACME, made.version), record, Overwrite())  # of a deletion that was cut short
    store.put(layout.version_key(ACME, 99), b"damaged", Create())
    leaving = registry.eraser.begin(ACME)
    assert (made.version, made.digest) in leaving.versions
    registry.eraser.remove(leaving)
    registry.eraser.finish(leaving)
    check_erased(registry)


def test_tensors_of_a_deleted_version_whose_weights_are_gone_or_damaged_are_no_reason_to_stop() -> None:
    for change in ("gone", "damaged"):
        store = MemoryStore()
        registry = Registry(store)
        registry.create_tenant(ACME)
        digest = registry.register(ACME, tiny_weights(1.0), "tiny", TINY_SPECS).version.digest
        registry.register(ACME, tiny_weights(2.0), "tiny", TINY_SPECS, alias=AliasName("production"))
        registry.delete_version(ACME, 1)
        if change == "gone":
            store.delete(layout.blob_key(digest))
        else:
            store.put(layout.blob_key(digest), b"no weights", Overwrite())
        assert digest in erase(registry).removed_blobs
        assert not list(store.list(layout.BLOBS))
