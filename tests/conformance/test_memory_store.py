"""The conformance suite on the memory backend, also where listings come in no order."""

import pytest

from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import DisorderedStore
from flatshare_registry.testing.store_suite import BlobStoreSuite


class TestMemoryStore(BlobStoreSuite):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore("test")


class TestDisorderedStore(BlobStoreSuite):
    @pytest.fixture
    def store(self) -> DisorderedStore:
        return DisorderedStore(MemoryStore("test"))
