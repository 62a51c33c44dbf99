"""Fetch and place: what is checked before a model is used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save

from flatshare.cache.loading import DevicePlacer, StoreSource
from flatshare.cache.tiers import Tier
from flatshare.errors import ModelFailed
from flatshare.models.architecture import architecture
from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore

NETWORK = architecture("mnist-cnn")


@pytest.fixture(scope="module")
def weights() -> bytes:
    torch.manual_seed(1)
    return save(dict(NETWORK.build().state_dict()))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def record(store: MemoryStore, weights: bytes) -> VersionRecord:
    registry = Registry(store)
    registry.create_tenant(TenantId("acme"))
    return registry.register(TenantId("acme"), weights, NETWORK.name, NETWORK.tensors).version


async def test_a_model_is_fetched_and_placed(
    store: MemoryStore, record: VersionRecord, weights: bytes, threads: ThreadPoolExecutor
) -> None:
    fetched = await StoreSource(store, threads).fetch(record)
    assert (fetched.data, fetched.tier) == (weights, Tier.STORE)
    placer = DevicePlacer(torch.device("cpu"), threads)
    placer.check(record)
    placed = await placer.place(record, await placer.prepare(record, fetched))
    assert placed.size_bytes == sum(tensor.size_bytes for tensor in record.tensors)
    torch.manual_seed(1)
    reference = NETWORK.build()
    rows = torch.rand(5, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(placed.module(rows), reference(rows), rtol=1e-5, atol=1e-5)


async def test_promise_12_every_flipped_bit_is_found(
    store: MemoryStore, record: VersionRecord, weights: bytes, threads: ThreadPoolExecutor
) -> None:
    key = layout.blob_key(record.digest)
    for position in (0, 9, 500, len(weights) // 2, len(weights) - 1):
        damaged = bytearray(weights)
        damaged[position] ^= 1
        store.put(key, bytes(damaged), Overwrite())
        with pytest.raises(Corrupt, match="sha256"):
            await StoreSource(store, threads).fetch(record)
    store.put(key, weights[:-1], Overwrite())
    with pytest.raises(Corrupt):
        await StoreSource(store, threads).fetch(record)
    store.delete(key)
    with pytest.raises(Corrupt, match="gone"):
        await StoreSource(store, threads).fetch(record)


async def test_a_record_that_lies_about_byte_ranges_is_corrupt(
    store: MemoryStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    first = record.tensors[0].model_copy(update={"start": record.tensors[0].start + 4})
    lying = record.model_copy(update={"tensors": (first, *record.tensors[1:])})
    with pytest.raises(Corrupt, match="does not fit"):
        await StoreSource(store, threads).fetch(lying)


async def test_a_store_that_is_down_is_unavailable(
    store: MemoryStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    def down(operation: str, key: str) -> None:
        raise Unavailable("down")

    with pytest.raises(Unavailable):
        await StoreSource(FaultyStore(store, before=down), threads).fetch(record)


def test_an_architecture_that_is_not_installed_or_changed_is_refused(
    record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    placer = DevicePlacer(torch.device("cpu"), threads)
    for changed in (
        record.model_copy(update={"architecture": "gone"}),
        record.model_copy(update={"architecture": "mnist-resnet18"}),
    ):
        with pytest.raises(ModelFailed, match="can't be served here"):
            placer.check(changed)
