"""A tenant out of one registry and into another, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatshare_registry import Quotas, Registry, TenantId
from flatshare_registry.errors import AlreadyExists, Corrupt, InvalidInput, NotFound
from flatshare_registry.ids import AliasName
from flatshare_registry.keys import is_valid, parse_key
from flatshare_registry.stores.base import BlobStore, Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import CrashAtStep, FaultyStore
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
    return {meta.key: store.get(meta.key).data for meta in store.list("") if "globex" not in meta.key}


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
    assert is_valid(parse_key(made.text), there.head(ACME).keys[made.id].sha256), "keys go on being good"
    import_tenant(other, tmp_path / "acme")  # once more changes nothing
    assert everything(other) == everything(registry.store)


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
    from flatshare_registry import layout

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
