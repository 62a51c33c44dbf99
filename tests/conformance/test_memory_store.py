"""The conformance suite on the memory backend, also where listings come in no order."""

import pytest

from flatshare_registry.errors import NotFound, Unavailable
from flatshare_registry.stores.base import Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.stores.wrapped import CountedStore, StoreCounts
from flatshare_registry.testing.faults import DisorderedStore, FaultyStore
from flatshare_registry.testing.store_suite import BlobStoreSuite


class TestMemoryStore(BlobStoreSuite):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore("test")


class TestDisorderedStore(BlobStoreSuite):
    @pytest.fixture
    def store(self) -> DisorderedStore:
        return DisorderedStore(MemoryStore("test"))


class TestCountedStore(BlobStoreSuite):
    @pytest.fixture
    def store(self) -> CountedStore:
        return CountedStore(MemoryStore("test"))


def test_calls_are_counted_and_so_are_those_without_an_answer() -> None:
    def down(operation: str, key: str) -> None:
        if key.startswith("down/"):
            raise Unavailable("no answer")

    store = CountedStore(FaultyStore(MemoryStore("test"), before=down))
    store.put("a", b"1", Overwrite())
    assert b"".join(store.chunks("a")) == b"1" and [one.key for one in store.list("")] == ["a"]
    with pytest.raises(NotFound):
        store.get("b")
    assert store.counts == StoreCounts(requests=4, errors=0)
    with pytest.raises(Unavailable):
        list(store.list("down/"))
    with pytest.raises(Unavailable):
        store.head("down/x")
    assert store.counts == StoreCounts(requests=6, errors=2)
