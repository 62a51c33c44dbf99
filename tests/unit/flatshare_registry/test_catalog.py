"""The registry's operations, and what a crash between any two steps leaves behind."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import (
    AliasMoved,
    AlreadyExists,
    Conflict,
    Corrupt,
    InvalidInput,
    InvalidWeights,
    NotFound,
    RegistryError,
    StillReferenced,
    Unavailable,
)
from flatshare_registry.heads import select
from flatshare_registry.ids import PRODUCTION, AliasName, ModelRef, TenantId
from flatshare_registry.records import Action, AuditEntry
from flatshare_registry.stores.base import BlobMeta, BlobStore, Create, Overwrite, PutMode
from flatshare_registry.stores.local import LocalStore
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import CrashAtStep, DisorderedStore, FaultyStore, ManualClock
from flatshare_registry.testing.files import TINY_SPECS as SPECS
from flatshare_registry.testing.files import encode_safetensors
from flatshare_registry.testing.files import tiny_weights as weights

ACME, GLOBEX, CANARY = TenantId("acme"), TenantId("globex"), AliasName("canary")


def make(store: object = None, clock: ManualClock | None = None) -> Registry:
    return Registry(store or MemoryStore(), actor="tests", clock=clock or ManualClock())


@pytest.fixture(params=[MemoryStore, lambda: DisorderedStore(MemoryStore())], ids=["ordered", "disordered"])
def registry(request: pytest.FixtureRequest) -> Registry:
    registry = make(request.param())
    registry.create_tenant(ACME)
    return registry


def register(registry: Registry, value: float, alias: AliasName | None = None) -> int:
    return registry.register(ACME, weights(value), "tiny", SPECS, alias=alias).version.version


def test_the_first_version_becomes_production(registry: Registry) -> None:
    assert register(registry, 1) == 1
    assert register(registry, 2) == 2
    assert registry.resolve(ModelRef.parse("acme")).version == 1
    assert registry.resolve(ModelRef.parse("acme@2")).name == "acme@2"


def test_equal_weights_are_one_version_and_one_blob(registry: Registry) -> None:
    first = registry.register(ACME, weights(1), "tiny", SPECS)
    again = registry.register(ACME, weights(1), "tiny", SPECS, alias=CANARY)
    assert (first.created, again.created) == (True, False)
    assert first.version == again.version
    assert registry.head(ACME).aliases == {"production": 1, "canary": 1}
    registry.create_tenant(GLOBEX)
    registry.register(GLOBEX, weights(1), "tiny", SPECS)
    assert len(list(registry.store.list(layout.BLOBS))) == 1


def test_bad_weights_touch_nothing(registry: Registry) -> None:
    before = [meta.key for meta in registry.store.list("")]
    with pytest.raises(InvalidWeights):
        registry.register(ACME, b"junk", "tiny", SPECS)
    with pytest.raises(InvalidWeights):
        registry.register(ACME, encode_safetensors({"x": np.zeros(4)}), "tiny", SPECS)
    assert [meta.key for meta in registry.store.list("")] == before


def test_unknown_things_are_not_found(registry: Registry) -> None:
    register(registry, 1)
    for call in (
        lambda: registry.head(GLOBEX),
        lambda: registry.register(GLOBEX, weights(1), "tiny", SPECS),
        lambda: registry.resolve(ModelRef.parse("acme@9")),
        lambda: registry.resolve(ModelRef.parse("acme:canary")),
        lambda: registry.set_alias(ACME, CANARY, 9),
        lambda: registry.remove_alias(ACME, CANARY),
        lambda: registry.delete_version(ACME, 9),
        lambda: registry.delete_tenant(GLOBEX),
        lambda: registry.audit(GLOBEX),
        lambda: registry.rollback(ACME, CANARY),
    ):
        with pytest.raises(NotFound):
            call()


def test_create_twice_is_refused(registry: Registry) -> None:
    with pytest.raises(AlreadyExists):
        registry.create_tenant(ACME)


def test_promote_and_roll_back(registry: Registry) -> None:
    for value in (1, 2, 3):
        register(registry, value)
    registry.set_alias(ACME, PRODUCTION, 2)
    registry.set_alias(ACME, CANARY, 3)
    registry.set_alias(ACME, PRODUCTION, 3)
    assert registry.rollback(ACME).aliases["production"] == 2
    assert registry.rollback(ACME).aliases["production"] == 3  # a rollback is a move like any other
    assert registry.head(ACME).aliases["canary"] == 3


def test_a_rollback_that_says_from_what_can_be_sent_again(registry: Registry) -> None:
    for value in (1, 2, 3):
        register(registry, value)
    registry.set_alias(ACME, PRODUCTION, 2)
    for _ in range(3):
        assert registry.rollback(ACME, expected=2).aliases["production"] == 1
    moves = [entry for entry in registry.audit(ACME) if entry.action is Action.ALIAS_ROLLED_BACK]
    assert len(moves) == 1, "the later ones changed nothing"
    registry.set_alias(ACME, CANARY, 2)  # another alias's move is not this one's
    assert registry.rollback(ACME, expected=2).aliases["production"] == 1
    for expected in (3, 7):
        with pytest.raises(AliasMoved, match=f"names version 1, not {expected}"):
            registry.rollback(ACME, expected=expected)
    registry.set_alias(ACME, PRODUCTION, 3)
    with pytest.raises(AliasMoved, match="names version 3, not 2"):
        registry.rollback(ACME, expected=2)
    assert registry.rollback(ACME, expected=3).aliases["production"] == 1
    assert registry.rollback(ACME, expected=1).aliases["production"] == 3, "asked for, so done"


def test_a_rollback_from_what_never_was_is_refused(registry: Registry) -> None:
    register(registry, 1)
    with pytest.raises(AliasMoved):
        registry.rollback(ACME, expected=2)


def test_the_log_is_read_by_pages(registry: Registry) -> None:
    for value in range(1, 8):
        register(registry, value)
    everything = registry.audit(ACME)
    assert registry.audit_page(ACME, 100) == (everything, False)
    assert registry.audit_page(ACME, len(everything)) == (everything, False)
    seen: list[AuditEntry] = []
    before, more = None, True
    while more:
        page, more = registry.audit_page(ACME, 3, before)
        assert 0 < len(page) <= 3
        seen, before = page + seen, page[0].id
    assert seen == everything
    assert registry.audit_page(ACME, 3, everything[0].id) == ([], False)
    with pytest.raises(NotFound):
        registry.audit_page(TenantId("nobody"), 3)


def test_a_page_reads_no_more_than_its_entries_and_knows_the_one_in_the_head(registry: Registry) -> None:
    for value in range(1, 8):
        register(registry, value)
    last = registry.head(ACME).last_entry
    registry.store.delete(layout.log_key(ACME, last.id))  # its writer died before it wrote that
    read: list[str] = []
    counted = Registry(
        FaultyStore(registry.store, before=lambda operation, key: read.append(f"{operation} {key}"))
    )
    page, more = counted.audit_page(ACME, 3)
    assert (page, more) == (registry.audit(ACME)[-3:], True)
    assert page[-1] == last
    assert len([one for one in read if "/log/" in one and one.startswith("get")]) == 2


def test_rollback_goes_to_the_last_move_whatever_the_order_of_the_listing(registry: Registry) -> None:
    for value in (1, 2, 3):
        register(registry, value)
    for version in (3, 2, 3):
        registry.set_alias(ACME, PRODUCTION, version)
    registry.set_alias(ACME, CANARY, 1)
    assert registry.rollback(ACME).aliases["production"] == 2


def test_rollback_without_history_or_to_a_deleted_version_is_refused(registry: Registry) -> None:
    register(registry, 1)
    with pytest.raises(NotFound, match="no version before"):
        registry.rollback(ACME)
    register(registry, 2, PRODUCTION)
    registry.delete_version(ACME, 1)
    with pytest.raises(NotFound, match="which is deleted"):
        registry.rollback(ACME)
    assert registry.head(ACME).aliases == {"production": 2}


def test_a_version_that_an_alias_names_is_not_deleted(registry: Registry) -> None:
    register(registry, 1)
    with pytest.raises(StillReferenced, match="production"):
        registry.delete_version(ACME, 1)
    register(registry, 2, PRODUCTION)
    registry.delete_version(ACME, 1)
    assert [record.version for record in registry.list_versions(ACME)] == [2]
    assert register(registry, 1) == 3  # numbers are never used twice


def test_a_deleted_tenant_is_gone_and_its_numbers_stay_used(registry: Registry) -> None:
    register(registry, 1)
    registry.delete_tenant(ACME)
    assert registry.list_tenants() == []
    with pytest.raises(NotFound):
        registry.resolve(ModelRef.parse("acme@1"))
    with pytest.raises(NotFound):
        registry.delete_tenant(ACME)
    registry.create_tenant(ACME)
    assert registry.list_versions(ACME) == []
    assert register(registry, 5) == 2
    assert [head.tenant for head in registry.list_tenants()] == ["acme"]


def test_every_change_has_one_audit_entry(registry: Registry) -> None:
    register(registry, 1)
    register(registry, 2, CANARY)
    registry.set_alias(ACME, PRODUCTION, 2)
    registry.set_alias(ACME, PRODUCTION, 2)  # changes nothing, so no entry
    registry.rollback(ACME)
    registry.remove_alias(ACME, CANARY)
    registry.delete_version(ACME, 2)
    registry.delete_tenant(ACME)
    entries = registry.audit(ACME)
    assert [(e.action, e.alias, e.from_version, e.to_version) for e in entries] == [
        (Action.TENANT_CREATED, None, None, None),
        (Action.VERSION_REGISTERED, None, None, 1),
        (Action.VERSION_REGISTERED, "canary", None, 2),
        (Action.ALIAS_SET, "production", 1, 2),
        (Action.ALIAS_ROLLED_BACK, "production", 2, 1),
        (Action.ALIAS_REMOVED, "canary", 2, None),
        (Action.VERSION_DELETED, None, 2, None),
        (Action.TENANT_DELETED, None, None, None),
    ]
    assert [e.revision for e in entries] == list(range(1, 9))
    assert {e.actor for e in entries} == {"tests"}


def test_a_record_that_is_not_what_the_head_names_is_corrupt(registry: Registry) -> None:
    register(registry, 1)
    register(registry, 2)
    key = layout.version_key(ACME, 1)
    other = registry.store.get(layout.version_key(ACME, 2)).data
    for damage in (other, b"{}", b"\xff"):
        registry.store.put(key, damage, Overwrite())
        with pytest.raises(Corrupt):
            registry.version(ACME, 1)
    registry.store.delete(key)
    with pytest.raises(Corrupt):
        registry.version(ACME, 1)


def test_a_record_of_a_newer_release_is_refused(registry: Registry) -> None:
    key = layout.head_key(ACME)
    data = registry.store.get(key).data.replace(b'"schema_version":1', b'"schema_version":2', 1)
    registry.store.put(key, data, Overwrite())
    with pytest.raises(Corrupt, match="newer flatshare"):
        registry.head(ACME)


def readable_state(registry: Registry) -> dict[str, object]:
    """All that a reader can see."""
    state: dict[str, object] = {}
    for head in registry.list_tenants():
        tenant = TenantId(head.tenant)
        state[tenant] = (
            dict(head.aliases),
            [(r.version, r.digest) for r in registry.list_versions(tenant)],
        )
        for record in registry.list_versions(tenant):
            assert registry.store.get(layout.blob_key(record.digest)).meta.size_bytes == record.size_bytes
    return state


def prepared(store: MemoryStore) -> Registry:
    registry = make(store)
    registry.create_tenant(ACME)
    for value in (1, 2):
        register(registry, value)
    registry.set_alias(ACME, PRODUCTION, 2)
    return registry


OPERATIONS: dict[str, Callable[[Registry], object]] = {
    "create tenant": lambda r: r.create_tenant(GLOBEX),
    "register": lambda r: r.register(ACME, weights(3), "tiny", SPECS),
    "register with alias": lambda r: r.register(ACME, weights(3), "tiny", SPECS, alias=PRODUCTION),
    "register equal weights": lambda r: r.register(ACME, weights(1), "tiny", SPECS, alias=CANARY),
    "set alias": lambda r: r.set_alias(ACME, PRODUCTION, 1),
    "rollback": lambda r: r.rollback(ACME),
    "remove alias": lambda r: r.remove_alias(ACME, PRODUCTION),
    "delete version": lambda r: r.delete_version(ACME, 1),
    "delete tenant": lambda r: r.delete_tenant(ACME),
}


@pytest.mark.parametrize("lost_answer", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_at_any_step_leaves_old_or_new_state_and_a_retry_finishes(
    name: str, lost_answer: bool
) -> None:
    operation = OPERATIONS[name]
    reference = prepared(MemoryStore())
    old = readable_state(reference)
    operation(reference)
    new = readable_state(reference)
    actions = [e.action for e in reference.audit(ACME)]

    for step in range(50):
        store = MemoryStore()
        prepared(store)
        crash = CrashAtStep(step)
        faulty = FaultyStore(store, after=crash) if lost_answer else FaultyStore(store, before=crash)
        try:
            operation(make(faulty))
        except Unavailable:
            pass
        survivor = make(store)
        state = readable_state(survivor)
        assert state in (old, new), f"half-visible after a crash at step {step}"
        if not crash.crashed:
            assert state == new
            break
        try:
            operation(survivor)
        except (AlreadyExists, NotFound):
            assert state == new  # only when the crash came after the change
        if name != "rollback" or state == old:  # a second rollback is a new move
            assert_same_but_numbers(readable_state(survivor), new)
            assert [e.action for e in survivor.audit(ACME)] == actions, "one entry for every change"
    else:
        raise AssertionError("the operation never ran to its end")
    assert step > 0, "no step was ever failed"


def assert_same_but_numbers(found: dict[str, object], wanted: dict[str, object]) -> None:
    """Equal, but a version's number may be higher: a crash can use one up."""

    def by_digest(state: dict[str, object]) -> dict[str, object]:
        result: dict[str, object] = {}
        for tenant, (aliases, versions) in state.items():  # type: ignore[misc]  # tuples from readable_state
            digests = dict(versions)
            result[tenant] = (
                {name: digests[number] for name, number in aliases.items()},
                sorted(digests.values()),
            )
        return result

    assert by_digest(found) == by_digest(wanted)


def test_a_lost_answer_and_a_rival_in_between_lose_nothing(registry: Registry) -> None:
    """The swap landed, boto3 retried and got 412, and meanwhile somebody else changed the head."""
    register(registry, 1)
    rival, lost = make(registry.store), []

    def after(operation: str, key: str) -> None:
        if operation == "put" and key == layout.head_key(ACME) and not lost:
            lost.append(key)
            rival.set_alias(ACME, CANARY, 1)
            raise Conflict("412 to the retry of a put that had landed")

    done = make(FaultyStore(registry.store, after=after)).register(ACME, weights(2), "tiny", SPECS)
    assert lost
    assert done.version.version == 2
    assert [record.version for record in registry.list_versions(ACME)] == [1, 2]
    assert [entry.revision for entry in registry.audit(ACME)] == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [Unavailable("down"), Conflict("409")])
def test_a_change_that_landed_is_not_reported_as_failed(registry: Registry, error: Exception) -> None:
    register(registry, 1)
    register(registry, 2, PRODUCTION)
    swapped = []

    def before(operation: str, key: str) -> None:
        if operation == "put" and key == layout.head_key(ACME):
            swapped.append(key)
        elif operation == "put" and swapped:
            raise error  # the log entry after the swap

    head = make(FaultyStore(registry.store, before=before)).rollback(ACME)
    assert head.aliases == {"production": 1}
    assert registry.audit(ACME)[-1].action is Action.ALIAS_ROLLED_BACK
    registry.set_alias(ACME, CANARY, 2)  # the next change writes what was missing
    assert len(list(registry.store.list(layout.log_prefix(ACME)))) == len(registry.audit(ACME))


def test_log_keys_sort_by_revision_even_with_a_clock_that_is_behind(registry: Registry) -> None:
    register(registry, 1)
    behind = make(registry.store, ManualClock(1_000_000.0))
    for value in (2, 3, 4):
        behind.register(ACME, weights(value), "tiny", SPECS)
        registry.set_alias(ACME, CANARY, value)
    keys = sorted(meta.key for meta in registry.store.list(layout.log_prefix(ACME)))
    ids = [layout.log_key(ACME, entry.id) for entry in registry.audit(ACME)]
    assert keys == ids


def test_a_store_that_is_down_is_unavailable_never_not_found(registry: Registry) -> None:
    def down(operation: str, key: str) -> None:
        raise Unavailable("down")

    broken = make(FaultyStore(registry.store, before=down))
    for call in (
        lambda: broken.head(ACME),
        lambda: broken.list_tenants(),
        lambda: broken.resolve(ModelRef.parse("acme")),
        lambda: broken.create_tenant(GLOBEX),
    ):
        with pytest.raises(Unavailable):
            call()


def test_a_swap_that_always_loses_gives_up(registry: Registry) -> None:
    rival = make(registry.store)

    def interfere(operation: str, key: str) -> None:
        if operation == "put" and key == layout.head_key(ACME):
            rival.set_alias(ACME, AliasName("rival"), 1 + rival.head(ACME).aliases.get("rival", 2) % 2)

    register(registry, 1)
    register(registry, 2)
    with pytest.raises(Unavailable, match="in a row lost"):
        make(FaultyStore(registry.store, before=interfere)).set_alias(ACME, CANARY, 1)


def _register_some(root: Path, values: list[int]) -> None:
    registry = Registry(LocalStore(root), actor=f"writer-{values[0]}")
    for value in values:
        registry.register(ACME, weights(value), "tiny", SPECS)


def test_two_processes_registering_at_once_both_succeed(tmp_path: Path) -> None:
    Registry(LocalStore(tmp_path)).create_tenant(ACME)
    spawn = multiprocessing.get_context("spawn")
    jobs = [list(range(10)), list(range(5, 15))]  # half of them equal weights
    workers = [spawn.Process(target=_register_some, args=(tmp_path, job)) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    registry = Registry(LocalStore(tmp_path))
    records = registry.list_versions(ACME)
    assert len({record.version for record in records}) == 15
    assert len({record.digest for record in records}) == 15
    entries = registry.audit(ACME)
    assert [entry.revision for entry in entries] == list(range(1, 17))


@pytest.mark.parametrize("error", RegistryError.__subclasses__())
def test_errors_survive_pickling(error: type[RegistryError]) -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(error("why")))
    assert type(copy) is error
    assert copy.message == str(copy) == "why"


def test_pins_are_kept_by_ref_and_forgotten_by_version() -> None:
    registry = Registry(MemoryStore())
    for tenant in ("acme", "globex"):
        registry.create_tenant(TenantId(tenant))
        for value in (1.0, 2.0):
            registry.register(TenantId(tenant), weights(value), "tiny", SPECS)
    texts = ["acme", "acme@1", "acme@2", "globex"]
    for text in [*texts, "acme"]:
        registry.pins.add(ModelRef.parse(text))
    assert [str(ref) for ref in registry.pins.refs()] == texts
    for text in ("nobody", "acme@9", "acme:canary"):
        with pytest.raises(NotFound):
            registry.pins.add(ModelRef.parse(text))
        with pytest.raises(NotFound):
            registry.pins.remove(ModelRef.parse(text))
    registry.pins.remove(ModelRef.parse("acme@1"))  # what the bare id means, too
    assert [str(ref) for ref in registry.pins.refs()] == ["acme@2", "globex"]
    registry.store.put(f"{layout.PINS}acme/no ref.json", b"{}", Overwrite())
    assert [str(ref) for ref in registry.pins.refs()] == ["acme@2", "globex"], "a stray object stops nobody"
    # What is deleted is pinned no more: else every replica that starts would ask for it in vain.
    acme, canary = TenantId("acme"), AliasName("canary")
    registry.set_alias(acme, canary, 2)
    registry.pins.add(ModelRef.parse("acme:canary"))
    registry.remove_alias(acme, canary)
    registry.delete_version(acme, 2)
    assert [str(ref) for ref in registry.pins.refs()] == ["globex"]
    registry.pins.add(ModelRef.parse("acme"))
    registry.delete_tenant(acme)
    assert [str(ref) for ref in registry.pins.refs()] == ["globex"]


# -- a tenant that is made with its first version


def test_a_missing_tenant_is_made_with_its_version_or_not_at_all() -> None:
    registry = make()

    def refuse(data: bytes | memoryview) -> tuple[float, ...]:
        raise InvalidWeights("they do not run")

    with pytest.raises(InvalidWeights):
        registry.register(ACME, b"junk", "tiny", SPECS, create=True)
    with pytest.raises(InvalidWeights):
        registry.register(ACME, weights(1.0), "tiny", SPECS, create=True, probe=refuse)
    with pytest.raises(InvalidInput):
        registry.register(ACME, weights(1.0), "tiny", SPECS, create=True, metadata={"a": "b" * 5000})
    with pytest.raises(NotFound):
        registry.register(ACME, weights(1.0), "tiny", SPECS)
    assert list(registry.store.list("")) == [], "nothing of it is there"
    assert registry.register(ACME, weights(1.0), "tiny", SPECS, create=True).version.version == 1
    assert [entry.action for entry in registry.audit(ACME)] == [
        Action.TENANT_CREATED,
        Action.VERSION_REGISTERED,
    ]
    assert registry.register(ACME, weights(2.0), "tiny", SPECS, create=True).version.version == 2


def test_a_tenant_that_a_colleague_makes_meanwhile_is_taken() -> None:
    registry = make()

    def colleague(data: bytes | memoryview) -> tuple[float, ...]:
        registry.create_tenant(ACME)
        return (1.0,)

    done = registry.register(ACME, weights(1.0), "tiny", SPECS, create=True, probe=colleague)
    assert (done.created, registry.head(ACME).aliases) == (True, {PRODUCTION: 1})


def test_a_deleted_tenant_comes_back_and_an_erased_one_does_not() -> None:
    registry = make()
    registry.register(ACME, weights(1.0), "tiny", SPECS, create=True)
    registry.delete_tenant(ACME)
    assert registry.register(ACME, weights(1.0), "tiny", SPECS, create=True).version.version == 2
    leaving = registry.eraser.begin(ACME)
    registry.eraser.remove(leaving)
    registry.eraser.finish(leaving)
    with pytest.raises(AlreadyExists, match="erased"):
        registry.register(ACME, weights(3.0), "tiny", SPECS, create=True)
    assert [meta.key for meta in registry.store.list("blobs/")] == []


class LostAnswers(FaultyStore):
    """A put of a head lands and its answer is lost; then somebody else's change; then boto3's retry meets 412."""

    meanwhile: Callable[[], object]
    lost = False

    def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
        meta = super().put(key, data, mode)
        if key == layout.head_key(ACME) and not self.lost:
            self.lost = True
            self.meanwhile()
            raise AlreadyExists("412") if isinstance(mode, Create) else Conflict("412")
        return meta


def losing(store: BlobStore, meanwhile: Callable[[], object]) -> Registry:
    faulty = LostAnswers(store)
    faulty.meanwhile = meanwhile
    return Registry(faulty, actor="oncall")


def test_a_change_whose_answer_is_lost_is_done_once(registry: Registry) -> None:
    """A colleague's change lies on top of it, so it is not the last entry any more."""
    for value in (1, 2):
        register(registry, value)
    registry.set_alias(ACME, PRODUCTION, 2)
    oncall = losing(registry.store, lambda: registry.tenancy.create_key(ACME))
    assert oncall.rollback(ACME).aliases["production"] == 1
    moves = [entry for entry in registry.audit(ACME) if entry.actor == "oncall"]
    assert [(entry.from_version, entry.to_version) for entry in moves] == [(2, 1)]
    key = registry.tenancy.create_key(ACME)
    losing(registry.store, lambda: registry.set_alias(ACME, PRODUCTION, 2)).tenancy.revoke_key(ACME, key.id)
    losing(registry.store, lambda: registry.create_tenant(ACME)).delete_tenant(ACME)
    assert registry.head(ACME).versions == {}, "it was created again, and is not deleted a second time"


def test_a_creation_whose_answer_is_lost_is_a_creation() -> None:
    store = MemoryStore()
    registry = Registry(store)
    assert losing(store, lambda: registry.tenancy.suspend(ACME)).create_tenant(ACME).tenant == ACME
    with pytest.raises(AlreadyExists):
        losing(store, lambda: None).create_tenant(ACME)


def test_numbers_of_a_deleted_tenant_are_not_given_out_again(registry: Registry) -> None:
    """Also not those of registrations that were cut short: their records' deletes may come late."""
    register(registry, 1)
    registry.store.put(layout.version_key(ACME, 7), b"{}", Create())
    registry.delete_tenant(ACME)
    registry.create_tenant(ACME)
    assert register(registry, 2) == 8


def test_an_alias_of_a_version_that_is_not_there_is_not_found(registry: Registry) -> None:
    register(registry, 1)
    head = registry.head(ACME)
    damaged = head.model_copy(update={"aliases": {**head.aliases, "canary": 7}})
    with pytest.raises(NotFound, match="version 7"):
        select(damaged, ModelRef.parse("acme:canary"))


def test_a_deed_outside_the_registry_is_noted_and_changes_nothing_else(registry: Registry) -> None:
    register(registry, 1)
    before = registry.head(ACME)
    registry.acting_as("ann", "request-7").note(ACME, Action.FLEET_UNLOAD, {"why": "a test"})
    entry, after = registry.last_entry(ACME), registry.head(ACME)
    assert (entry.actor, entry.request_id, entry.detail) == ("ann", "request-7", {"why": "a test"})
    assert (entry.action, entry.revision) == (Action.FLEET_UNLOAD, before.revision + 1)
    assert after == before.model_copy(update={"revision": entry.revision, "last_entry": entry})
    assert registry.audit(ACME)[-1] == entry and registry.verify_audit(ACME) == []
    assert (registry.actor, registry.acting_as("ann").actor) == ("tests", "ann")
    with pytest.raises(NotFound):
        registry.note(GLOBEX, Action.FLEET_UNLOAD, {})


def test_of_a_deleted_version_its_record_and_its_pin_go_and_others_stay(registry: Registry) -> None:
    for value in (1, 2, 3):
        register(registry, value)
        registry.pins.add(ModelRef(ACME, int(value)))
    registry.delete_version(ACME, 2)
    keys = {meta.key for meta in registry.store.list("")}
    for number in (1, 2, 3):
        assert (layout.version_key(ACME, number) in keys) == (number != 2)
        assert (layout.pin_key(ModelRef(ACME, number)) in keys) == (number != 2)
    assert [one.version for one in registry.list_versions(ACME)] == [1, 3]
