"""A tenant out of one registry and into another, byte for byte."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from flatshare_registry import Quotas, Registry, TenantId, layout
from flatshare_registry.errors import AlreadyExists, Corrupt, InvalidInput, NotFound, Unavailable
from flatshare_registry.gc import DEFAULT_GRACE_S, collect
from flatshare_registry.ids import AliasName
from flatshare_registry.keys import is_valid, parse_key
from flatshare_registry.stores.base import BlobStore, Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import CrashAtStep, FaultyStore, ManualClock
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights
from flatshare_registry.transfer import export_tenant, import_tenant

ACME = TenantId("acme")


@pytest.fixture
def registry() -> Registry:
    registry = Registry(MemoryStore())
    for tenant in (ACME, TenantId("globex")):
        registry.create_tenant(tenant)
    for value in (1.0, 2.0):
        registry.register(ACME, tiny_weights(value), "tiny", TINY_SPECS)
    registry.set_alias(ACME, AliasName("canary"), 2)
    registry.tenancy.set_quotas(ACME, Quotas(burst=3))
    return registry


def everything(store: BlobStore) -> dict[str, bytes]:
    """All of acme, but for its head, announcements, and what an import adds to its log."""
    return {
        meta.key: store.get(meta.key).data
        for meta in store.list("")
        if "globex" not in meta.key
        and not meta.key.startswith(layout.CHANGES)
        and not meta.key.endswith("/head.json")
        and b"tenant.imported" not in store.get(meta.key).data
    }


def test_there_and_in_another_registry_is_the_same(registry: Registry, tmp_path: Path) -> None:
    made = registry.tenancy.create_key(ACME)
    steps: list[tuple[int, int]] = []
    counts = export_tenant(registry.store, ACME, tmp_path / "acme", lambda *step: steps.append(step))
    assert (counts["versions"], counts["blobs"], counts["log"]) == (2, 2, 6)
    assert steps == [(1, 2), (2, 2)]
    other = MemoryStore()
    import_tenant(other, tmp_path / "acme")
    assert everything(other) == everything(registry.store)
    there = Registry(other)
    assert there.verify_audit(ACME) == []
    last = there.head(ACME).last_entry
    assert (last.action, last.detail["link"]) == ("tenant.imported", registry.head(ACME).last_entry.link)
    assert there.head(ACME).aliases == registry.head(ACME).aliases
    assert is_valid(parse_key(made.text), there.head(ACME).keys[made.id].sha256), "keys go on being good"
    import_tenant(other, tmp_path / "acme")  # once more changes nothing
    assert everything(other) == everything(registry.store)
    assert there.head(ACME).last_entry == last


def test_a_cut_import_shows_nothing_and_a_rerun_finishes(registry: Registry, tmp_path: Path) -> None:
    export_tenant(registry.store, ACME, tmp_path / "acme")
    for step in range(30):
        store = MemoryStore()
        crash = CrashAtStep(step)
        try:
            import_tenant(FaultyStore(store, before=crash), tmp_path / "acme")
        except Exception:
            assert crash.crashed
            with pytest.raises(NotFound):
                Registry(store).head(ACME)
        import_tenant(store, tmp_path / "acme")
        assert everything(store) == everything(registry.store)
        if not crash.crashed:
            return
    raise AssertionError("it never ended")


def test_what_is_there_already_is_not_touched(registry: Registry, tmp_path: Path) -> None:
    export_tenant(registry.store, ACME, tmp_path / "acme")
    registry.tenancy.suspend(ACME)
    before = everything(registry.store)
    with pytest.raises(AlreadyExists, match="acme"):
        import_tenant(registry.store, tmp_path / "acme")
    assert everything(registry.store) == before
    with pytest.raises(InvalidInput, match="not empty"):
        export_tenant(registry.store, ACME, tmp_path / "acme")
    with pytest.raises(NotFound):
        export_tenant(registry.store, TenantId("nobody"), tmp_path / "nobody")


@pytest.mark.parametrize("damage", ["blob", "record", "no head", "no blob", "no entry", "another's log"])
def test_a_folder_that_is_not_whole_is_refused_before_anything_is_written(
    registry: Registry, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "acme"
    export_tenant(registry.store, ACME, folder)
    blob = next((folder / "blobs").iterdir())
    record = folder / "versions" / "00000001.json"
    if damage == "blob":
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    elif damage == "record":
        record.write_text(record.read_text().replace('"version":1', '"version":2'))
    elif damage == "no head":
        (folder / "head.json").unlink()
    elif damage == "no blob":
        blob.unlink()
    elif damage == "no entry":
        sorted((folder / "log").iterdir())[2].unlink()
    else:
        entry = next((folder / "log").iterdir())
        entry.write_text(entry.read_text().replace("acme", "evil"))
    other = MemoryStore()
    with pytest.raises(InvalidInput, match="not"):
        import_tenant(other, folder)
    assert everything(other) == {}


def test_a_tenant_that_was_made_while_an_import_ran_is_not_reported_as_imported(
    registry: Registry, tmp_path: Path
) -> None:
    export_tenant(registry.store, ACME, tmp_path / "acme")
    assert (tmp_path / "acme").stat().st_mode & 0o777 == 0o700
    store = MemoryStore()

    def meet(operation: str, key: str) -> None:
        if operation == "put" and key.endswith("acme/head.json"):
            Registry(store).create_tenant(ACME)

    with pytest.raises(AlreadyExists):
        import_tenant(FaultyStore(store, before=meet), tmp_path / "acme")


def test_a_damaged_store_is_not_exported(registry: Registry, tmp_path: Path) -> None:
    registry.store.put(layout.blob_key(registry.version(ACME, 1).digest), b"junk", Overwrite())
    with pytest.raises(Corrupt):
        export_tenant(registry.store, ACME, tmp_path / "acme")
    assert not (tmp_path / "acme" / "head.json").exists()


def test_what_lies_beside_an_export_is_not_brought_along(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "acme"
    export_tenant(registry.store, ACME, folder)
    (folder / "blobs" / f"{'a' * 64}.safetensors").write_bytes(b"poison for whoever registers this digest")
    (folder / "versions" / "00000099.json").write_bytes(b"{}")
    other = MemoryStore()
    import_tenant(other, folder)
    assert everything(other) == everything(registry.store)


def test_limits_are_the_new_operators_to_say(registry: Registry, tmp_path: Path) -> None:
    export_tenant(registry.store, ACME, tmp_path / "acme")
    for with_quotas, wanted in ((False, Quotas()), (True, Quotas(burst=3))):
        store = MemoryStore()
        import_tenant(store, tmp_path / "acme", with_quotas=with_quotas, actor="cli:ann")
        head = Registry(store).head(ACME)
        assert head.quotas == wanted
        assert head.last_entry.actor == "cli:ann"
        assert Registry(store).verify_audit(ACME) == []


def edited(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "head.json").read_text())
    for name, value in changes.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    (folder / "head.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "changes",
    [
        {"aliases": {"gone": 7}},
        {"aliases": {"No Such Label": 1}},
        {"next_version": 2},
        {"state": "deleted"},
        {"state": "erased"},
        {"keys": {"globex.abcdefghij": None}},
    ],
)
def test_a_head_that_no_registry_would_write_is_refused(
    registry: Registry, tmp_path: Path, changes: dict[str, object]
) -> None:
    registry.tenancy.create_key(ACME)
    folder = tmp_path / "acme"
    export_tenant(registry.store, ACME, folder)
    if "keys" in changes:
        key = next(iter(json.loads((folder / "head.json").read_text())["keys"].values()))
        changes = {"keys": {"globex.abcdefghij": {**key, "id": "globex.abcdefghij"}}}
    edited(folder, **changes)
    store = MemoryStore()
    with pytest.raises(InvalidInput):
        import_tenant(store, folder)
    assert everything(store) == {}


def test_a_version_was_made_by_whom_the_log_says(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "acme"
    export_tenant(registry.store, ACME, folder)
    path = folder / "versions" / "00000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "created_by": "cli:boss"}))
    store = MemoryStore()
    with pytest.raises(InvalidInput, match="version 1 names another maker"):
        import_tenant(store, folder)
    assert everything(store) == {}


def test_a_record_must_say_what_its_weights_hold(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "acme"
    export_tenant(registry.store, ACME, folder)
    path = folder / "versions" / "00000001.json"
    record = json.loads(path.read_text())
    record["tensors"][0]["sha256"] = "ab" * 32
    path.write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match="does not say what its weights hold"):
        import_tenant(MemoryStore(), folder)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "sparse giant"])
@pytest.mark.parametrize("name", ["head.json", "versions/00000001.json", "blob", "log"])
def test_only_plain_files_are_read(registry: Registry, tmp_path: Path, kind: str, name: str) -> None:
    """A folder that somebody gave may hold a link to anything, a pipe that never ends, a file of any length."""
    folder = tmp_path / "acme"
    export_tenant(registry.store, ACME, folder)
    path = {"blob": next((folder / "blobs").iterdir()), "log": next((folder / "log").iterdir())}.get(
        name, folder / name
    )
    path.rename(tmp_path / "moved")
    if kind == "link":
        path.symlink_to(tmp_path / "moved")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 2**40)
    with pytest.raises(InvalidInput):
        import_tenant(MemoryStore(), folder)


def rerun_beside_gc(folder: Path, step: int) -> bool:
    """An import that was cut days ago is run again; gc runs at its ``step``. Whether it had as many steps."""
    clock = ManualClock()
    clock.advance(10**9)
    store = MemoryStore(clock=clock)

    def cut(operation: str, key: str) -> None:
        if operation == "put" and key == layout.head_key(ACME):
            raise Unavailable("cut")

    with pytest.raises(Unavailable):
        import_tenant(FaultyStore(store, before=cut), folder, clock=clock)
    clock.advance(2 * DEFAULT_GRACE_S)
    steps = itertools.count()

    def meanwhile(operation: str, key: str) -> None:
        if next(steps) == step:
            collect(store, remove=True, clock=clock)

    import_tenant(FaultyStore(store, before=meanwhile), folder, clock=clock)
    for record in Registry(store, clock=clock).list_versions(ACME):
        assert store.get(layout.blob_key(record.digest)).meta.size_bytes == record.size_bytes
    return next(steps) > step


def test_a_rerun_beside_gc_loses_nothing(registry: Registry, tmp_path: Path) -> None:
    export_tenant(registry.store, ACME, tmp_path / "acme")
    ended = [step for step in range(80) if not rerun_beside_gc(tmp_path / "acme", step)]
    assert ended and ended[0] > 20, "it has many steps, and all of them were tried"
