"""The conformance suite on the memory backend."""

import pytest

from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.store_suite import BlobStoreSuite


class TestMemoryStore(BlobStoreSuite):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore("test")
