"""A store that ignores conditional writes is found out at a process's first write, before anything is lost."""

from __future__ import annotations

import pytest
from tests.odd_s3 import ODDITIES, odd_s3

from flatshare_registry import Registry, TenantId
from flatshare_registry.errors import Conflict, UnfitStore
from flatshare_registry.stores import s3
from flatshare_registry.stores.base import BlobMeta, PutMode, UpdateIf
from flatshare_registry.stores.conditions import check_conditions
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.stores.open import open_store
from flatshare_registry.stores.s3 import S3Options
from flatshare_registry.testing.faults import FaultyStore

ACME = TenantId("acme")


@pytest.mark.parametrize(
    ("oddity", "why"),
    [
        ("creates-unconditional", "If-None-Match"),
        ("updates-unconditional", "If-Match"),
        ("conditions-dropped", "If-None-Match"),
    ],
)
def test_nothing_is_written_to_a_store_that_ignores_either(s3_url: str, oddity: str, why: str) -> None:
    bucket = f"s3://models/{oddity}"
    sound = Registry(open_store(bucket, S3Options(endpoint_url=s3_url)))
    sound.create_tenant(ACME)
    head = sound.head(ACME)
    with odd_s3(s3_url, ODDITIES[oddity]) as (url, _):
        registry = Registry(open_store(bucket, S3Options(endpoint_url=url)))
        assert registry.head(ACME) == head, "reading is no danger"
        for change in (registry.create_tenant, registry.tenancy.suspend):
            with pytest.raises(UnfitStore, match=why):
                change(ACME)
    assert sound.head(ACME) == head, "the first tenants create on such a store wiped the tenant"


def test_it_is_asked_once_a_process_and_bucket(s3_url: str) -> None:
    with odd_s3(s3_url, ODDITIES["none"]) as (url, seen):
        s3._checked.clear()
        for _ in range(2):
            registry = Registry(open_store("s3://models/once", S3Options(endpoint_url=url)))
            registry.create_tenant(TenantId(f"t{len(seen)}"))
        checks = [one for one in seen if "/checks/" in one.path]
        assert [one.method for one in checks] == ["PUT", "PUT", "PUT", "PUT", "DELETE"]


def test_a_store_that_refuses_its_own_etag_is_named() -> None:
    class Stubborn(FaultyStore):
        def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
            if isinstance(mode, UpdateIf):
                raise Conflict("never")
            return super().put(key, data, mode)

    store = Stubborn(MemoryStore())
    with pytest.raises(UnfitStore, match="refuses If-Match"):
        check_conditions(store)
    assert list(store.list("")) == []
