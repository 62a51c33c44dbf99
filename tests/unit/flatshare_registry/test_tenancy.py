"""Keys, quotas, suspension in the registry; and a log that shows when it was tampered with."""

from __future__ import annotations

from datetime import timedelta

import pytest

from flatshare_registry import Quotas, Registry, Scope, TenantId, layout
from flatshare_registry.errors import AlreadyExists, InvalidInput, NotFound
from flatshare_registry.gc import collect
from flatshare_registry.keys import is_valid, parse_key
from flatshare_registry.records import AuditEntry, TenantHead, TenantState
from flatshare_registry.stores.base import Create, Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.tenancy import MAX_KEYS
from flatshare_registry.testing.faults import FaultyStore, ManualClock
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

ACME = TenantId("acme")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def registry(clock: ManualClock) -> Registry:
    registry = Registry(MemoryStore(clock=clock), actor="tester", clock=clock)
    registry.create_tenant(ACME)
    return registry


def test_a_keys_secret_is_stored_nowhere(registry: Registry) -> None:
    made = registry.tenancy.create_key(ACME, [Scope.PREDICT, Scope.MANAGE], label="checkout")
    key = registry.head(ACME).keys[made.id]
    assert is_valid(parse_key(made.text), key.sha256)
    assert (key.scopes, key.label, key.created_by, key.expires_at) == (
        (Scope.MANAGE, Scope.PREDICT), "checkout", "tester", None,
    )  # fmt: skip
    secret = made.text.rpartition(f"{made.id}_")[2]
    for meta in registry.store.list(""):
        assert secret.encode() not in registry.store.get(meta.key).data
    entry = registry.audit(ACME)[-1]
    assert (entry.action, entry.detail["key"]) == ("key.created", made.id)


def test_a_request_that_is_sent_again_makes_no_second_key(registry: Registry) -> None:
    tenancy = registry.tenancy
    made = tenancy.create_key(ACME, once="3f0c")
    assert is_valid(parse_key(made.text), registry.head(ACME).keys[made.id].sha256)
    with pytest.raises(AlreadyExists, match=made.id):
        tenancy.create_key(ACME, once="3f0c")
    assert list(registry.head(ACME).keys) == [made.id]
    others = {
        tenancy.create_key(ACME, once="3f0d").id,
        tenancy.create_key(ACME).id,
        tenancy.create_key(ACME).id,
    }
    assert len({made.id, *others}) == 4
    rotated = tenancy.rotate_key(ACME, made.id, grace_s=60, once="3f0c")
    with pytest.raises(AlreadyExists, match=rotated.id):
        tenancy.rotate_key(ACME, made.id, grace_s=60, once="3f0c")
    assert tenancy.rotate_key(ACME, rotated.id, grace_s=60, once="3f0c").id not in (made.id, rotated.id)
    registry.create_tenant(TenantId("globex"))
    other = tenancy.create_key(TenantId("globex"), once="3f0c")
    assert other.id.partition(".")[2] != made.id.partition(".")[2], (
        "one tenant's ids tell nothing of another's"
    )
    tenancy.revoke_key(ACME, made.id)
    again = tenancy.create_key(ACME, once="3f0c")
    assert again.sha256 != made.sha256, "the secret is random, whatever the id"


def test_who_was_given_a_used_id_does_not_read_what_was_before(registry: Registry) -> None:
    registry.tenancy.create_key(ACME, [Scope.MANAGE], label="the old customer's secret project")
    registry.delete_tenant(ACME)
    own = registry.audit(ACME, since_created=True)
    assert own[0].action == "tenant.created", "of one that is gone, its own life"
    registry.create_tenant(ACME)
    new = registry.tenancy.create_key(ACME, [Scope.MANAGE], label="new")
    own = registry.audit(ACME, since_created=True)
    assert [entry.action for entry in own] == ["tenant.created", "key.created"]
    assert own[1].detail["key"] == new.id
    everything = registry.audit(ACME)
    assert [entry.action for entry in everything] == [
        "tenant.created", "key.created", "tenant.deleted", "tenant.created", "key.created",
    ]  # fmt: skip
    assert everything[3:] == own


def test_pages_of_the_log_end_where_the_id_was_given_out_again(
    registry: Registry, clock: ManualClock
) -> None:
    for _ in range(3):
        registry.tenancy.create_key(ACME, [Scope.MANAGE], label="the old customer's")
    registry.delete_tenant(ACME)
    old = registry.audit(ACME)
    clock.advance(1)
    registry.create_tenant(ACME)
    registry.tenancy.create_key(ACME, [Scope.MANAGE], label="new")
    entries, more = registry.audit_page(ACME, 100, own=True)
    assert [entry.action for entry in entries] == ["tenant.created", "key.created"]
    assert not more
    for cursor in (old[-1].id, old[2].id, entries[0].id):
        assert registry.audit_page(ACME, 100, cursor, own=True) == ([], False)
    assert registry.audit_page(ACME, 1, own=True) == (entries[1:], True)
    assert len(registry.audit_page(ACME, 100)[0]) == len(old) + 2, "operators see all"


def test_entries_of_before_are_not_even_read(registry: Registry) -> None:
    for _ in range(20):
        registry.tenancy.suspend(ACME)
        registry.tenancy.resume(ACME)
    registry.delete_tenant(ACME)
    registry.create_tenant(ACME)
    read: list[str] = []
    counted = Registry(FaultyStore(registry.store, before=lambda operation, key: read.append(key)), actor="x")
    assert len(counted.audit(ACME, since_created=True)) == 1
    assert len([key for key in read if "/log/" in key and not key.endswith("/")]) == 0


def test_rotation_leaves_both_good_for_the_grace_and_then_one(registry: Registry, clock: ManualClock) -> None:
    old = registry.tenancy.create_key(ACME, [Scope.MANAGE], label="ci")
    new = registry.tenancy.rotate_key(ACME, old.id, grace_s=3600)
    keys = registry.head(ACME).keys
    assert keys[new.id].scopes == keys[old.id].scopes
    assert keys[new.id].label == "ci"
    assert keys[new.id].expires_at is None
    assert keys[old.id].expires_at == keys[new.id].created_at + timedelta(seconds=3600)
    registry.tenancy.rotate_key(ACME, old.id, grace_s=7200)
    assert registry.head(ACME).keys[old.id].expires_at == keys[old.id].expires_at, "never later than it was"
    registry.tenancy.revoke_key(ACME, old.id)
    assert old.id not in registry.head(ACME).keys
    with pytest.raises(NotFound, match="no key"):
        registry.tenancy.revoke_key(ACME, old.id)
    with pytest.raises(NotFound, match="no key"):
        registry.tenancy.rotate_key(ACME, old.id, grace_s=1)


def test_keys_have_a_limit_and_expired_ones_make_room(registry: Registry, clock: ManualClock) -> None:
    for _ in range(MAX_KEYS):
        registry.tenancy.create_key(ACME, lifetime_s=60)
    with pytest.raises(InvalidInput, match="revoke some"):
        registry.tenancy.create_key(ACME)
    clock.advance(61)
    registry.tenancy.create_key(ACME)
    assert len(registry.head(ACME).keys) == 1


@pytest.mark.parametrize(
    "bad", [{"scopes": []}, {"label": "x" * 101}, {"label": "a\nb"}, {"lifetime_s": 0}, {"lifetime_s": 1e18}]
)
def test_a_key_that_can_not_be_is_refused(registry: Registry, bad: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        registry.tenancy.create_key(ACME, **bad)  # type: ignore[arg-type]  # that is the point
    assert registry.head(ACME).keys == {}


def test_quotas_are_what_differs_from_the_plan(registry: Registry) -> None:
    plan = Quotas(requests_per_s=10, rows_per_request=8)
    head = registry.tenancy.set_quotas(ACME, Quotas(requests_per_s=50), plan="gold")
    assert head.plan == "gold"
    effective = head.quotas.over(plan)
    assert (effective.requests_per_s, effective.rows_per_request, effective.burst) == (50, 8, None)
    assert registry.tenancy.set_quotas(ACME, Quotas(burst=3)).plan == "gold", "not named: as it is"
    entry = registry.audit(ACME)[-1]
    assert entry.detail == {"from": 'gold {"requests_per_s":50.0}', "to": 'gold {"burst":3}'}
    with pytest.raises(InvalidInput, match="floor"):
        registry.tenancy.set_quotas(ACME, Quotas(resident_bytes=5, resident_floor_bytes=6))
    for bad in ({"requests_per_s": 0}, {"requests_per_s": float("nan")}, {"burst": -1}, {"speed": 3}):
        with pytest.raises(ValueError, match="validation error"):
            Quotas.model_validate(bad)


def test_two_edits_of_quotas_at_a_time_both_stand(registry: Registry) -> None:
    seen: list[Quotas] = []

    def slow(quotas: Quotas) -> Quotas:
        seen.append(quotas)
        if len(seen) == 1:  # a colleague is faster than this edit's swap
            registry.tenancy.edit_quotas(ACME, lambda now: now.model_copy(update={"burst": 10}))
        return quotas.model_copy(update={"requests_per_s": 50.0})

    head = registry.tenancy.edit_quotas(ACME, slow, plan="gold")
    assert (head.quotas.burst, head.quotas.requests_per_s, head.plan) == (10, 50.0, "gold")
    assert [one.burst for one in seen] == [None, 10]
    with pytest.raises(InvalidInput, match="floor"):
        registry.tenancy.edit_quotas(
            ACME, lambda now: now.model_copy(update={"resident_bytes": 5, "resident_floor_bytes": 6})
        )


def test_suspension_deletes_nothing(registry: Registry, clock: ManualClock) -> None:
    record = registry.register(ACME, tiny_weights(1.0), "tiny", TINY_SPECS).version
    registry.tenancy.suspend(ACME)
    assert registry.head(ACME).state is TenantState.SUSPENDED
    assert [head.tenant for head in registry.list_tenants()] == ["acme"]
    with pytest.raises(AlreadyExists):
        registry.create_tenant(ACME)
    clock.advance(10 * 86_400)
    assert collect(registry.store, remove=True, clock=clock).garbage == ()
    registry.tenancy.resume(ACME)
    assert registry.version(ACME, record.version) == record
    revision = registry.head(ACME).revision
    registry.tenancy.resume(ACME)
    assert registry.head(ACME).revision == revision, "nothing changed, nothing is written"


def test_a_deleted_tenant_comes_back_without_keys_or_quotas(registry: Registry) -> None:
    registry.tenancy.create_key(ACME)
    registry.tenancy.set_quotas(ACME, Quotas(burst=3), plan="gold")
    registry.delete_tenant(ACME)
    head = registry.create_tenant(ACME)
    assert (head.keys, head.quotas, head.plan) == ({}, Quotas(), "default")


def test_changes_name_who_made_them_and_by_which_request(registry: Registry) -> None:
    registry.acting_as("key:acme.q3v7k2m9d1", "req-7").tenancy.suspend(ACME)
    entry = registry.audit(ACME)[-1]
    assert (entry.actor, entry.request_id) == ("key:acme.q3v7k2m9d1", "req-7")
    assert registry.audit(ACME)[0].actor == "tester"


# -- the chain


def entries(registry: Registry) -> list[tuple[str, AuditEntry]]:
    found = [
        (meta.key, registry.store.get(meta.key).data) for meta in registry.store.list(layout.log_prefix(ACME))
    ]
    return [(key, AuditEntry.decode(data, key)) for key, data in found]


@pytest.fixture
def written(registry: Registry) -> Registry:
    registry.register(ACME, tiny_weights(1.0), "tiny", TINY_SPECS)
    registry.tenancy.create_key(ACME, label="x")
    registry.tenancy.suspend(ACME)
    registry.tenancy.resume(ACME)
    assert registry.verify_audit(ACME) == []
    assert len(entries(registry)) == 5
    return registry


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    "change", [{"actor": "somebody else"}, {"detail": {"label": "y"}}, {"to_version": 9}, {"revision": 2}]
)
def test_an_altered_entry_is_found(written: Registry, index: int, change: dict[str, object]) -> None:
    key, entry = entries(written)[index]
    altered = entry.model_copy(update=change)
    if altered == entry:  # this entry says so already: the same, one further
        altered = entry.model_copy(update={"revision": entry.revision + 1})
    written.store.put(key, altered.encode(), Overwrite())
    assert written.verify_audit(ACME)


@pytest.mark.parametrize("index", range(4))
def test_a_removed_entry_is_found(written: Registry, index: int) -> None:
    written.store.delete(entries(written)[index][0])
    assert written.verify_audit(ACME) == [f"the entry of revision {index + 1} is missing"]


def test_the_newest_entry_is_in_the_head_too(written: Registry) -> None:
    written.store.delete(entries(written)[-1][0])
    assert written.verify_audit(ACME) == [], "its log object may be written late: nothing is lost"


def test_added_and_swapped_entries_and_an_altered_head_are_found(written: Registry) -> None:
    (first_key, first), (second_key, second) = entries(written)[:2]
    written.store.put(first_key, second.encode(), Overwrite())
    written.store.put(second_key, first.encode(), Overwrite())
    assert written.verify_audit(ACME)
    written.store.put(first_key, first.encode(), Overwrite())
    written.store.put(second_key, second.encode(), Overwrite())
    assert written.verify_audit(ACME) == []
    added = first.model_copy(update={"id": "0" * 26, "revision": 99})
    written.store.put(layout.log_key(ACME, added.id), added.encode(), Create())
    assert written.verify_audit(ACME) == ["there is an entry of revision 99"]
    written.store.delete(layout.log_key(ACME, added.id))
    key = layout.head_key(ACME)
    head = TenantHead.decode(written.store.get(key).data, key)
    forged = head.last_entry.model_copy(update={"actor": "nobody"})
    written.store.put(key, head.model_copy(update={"last_entry": forged}).encode(), Overwrite())
    assert written.verify_audit(ACME)
    with pytest.raises(NotFound):
        written.verify_audit(TenantId("nobody"))


def test_a_field_that_a_later_release_adds_does_not_break_the_links(registry: Registry) -> None:
    entry = registry.audit(ACME)[0]
    assert AuditEntry.model_validate(entry.model_dump(exclude_defaults=True)).link == entry.link
    assert "request_id" not in entry.model_dump_json(exclude_defaults=True)


def test_a_log_that_grows_while_it_is_checked_is_whole(written: Registry) -> None:
    grown: list[bool] = []

    def grow(operation: str, key: str) -> None:
        if operation == "list" and not grown:
            grown.append(True)
            written.tenancy.suspend(ACME)

    assert Registry(FaultyStore(written.store, before=grow)).verify_audit(ACME) == []
    assert grown


def test_an_expired_key_is_not_rotated_and_a_lifetime_goes_on(registry: Registry, clock: ManualClock) -> None:
    old = registry.tenancy.create_key(ACME, lifetime_s=100)
    clock.advance(50)
    new = registry.tenancy.rotate_key(ACME, old.id, grace_s=10)
    keys = registry.head(ACME).keys
    assert keys[new.id].expires_at == keys[new.id].created_at + timedelta(seconds=100)
    assert registry.audit(ACME)[-1].detail == {"key": old.id, "by": new.id}
    clock.advance(1000)
    with pytest.raises(InvalidInput, match="expired"):
        registry.tenancy.rotate_key(ACME, new.id, grace_s=10)
    assert set(registry.head(ACME).keys) == {old.id, new.id}, "nothing was made"
