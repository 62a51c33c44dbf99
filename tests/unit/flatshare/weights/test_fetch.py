"""Fetching from the store: bytes are used as they arrive, and a cut answer goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from flatshare.models.architecture import architecture
from flatshare.weights import fetch
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare.weights.tiers import Tier
from flatshare_registry import Registry, TenantId, layout
from flatshare_registry.errors import Corrupt, Unavailable
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import CHUNK_BYTES, ByteRange, Overwrite
from flatshare_registry.stores.memory import MemoryStore

NETWORK = architecture("mnist-cnn")


class CutStore(MemoryStore):
    """Cuts its first answers short, after so many pieces each."""

    def __init__(self, *cuts: int) -> None:
        super().__init__()
        self.cuts = list(cuts)
        self.asked: list[ByteRange | None] = []

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        self.asked.append(byte_range)
        left = self.cuts.pop(0) if self.cuts else None
        for piece in super().chunks(key, byte_range):
            if left == 0:
                raise Unavailable("the connection was reset")
            left = None if left is None else left - 1
            yield piece


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RETRY_S", 0.0)


def registered(store: MemoryStore) -> tuple[VersionRecord, bytes]:
    torch.manual_seed(3)
    weights = save(dict(NETWORK.build().state_dict()))
    registry = Registry(store)
    registry.create_tenant(TenantId("acme"))
    return registry.register(TenantId("acme"), weights, NETWORK.name, NETWORK.tensors).version, weights


def read(source: TensorSource, record: VersionRecord) -> dict[str, bytes]:
    found = source.read(record, {one.name for one in record.tensors}, 10)
    assert found.tier is Tier.STORE
    return {digest: bytes(data) for digest, data in found.data.items()}


@pytest.mark.parametrize("with_tier", [False, True])
def test_a_cut_answer_goes_on_where_it_stopped(tmp_path: Path, with_tier: bool) -> None:
    store = CutStore(3)
    record, weights = registered(store)
    tier = HostTier(tmp_path / "tier", 64 * 1024**2) if with_tier else None
    source = TensorSource(store, tier)
    found = read(source, record)
    assert {one.sha256: weights[one.start : one.end] for one in record.tensors} == found
    first, second = store.asked
    start = min(one.start for one in record.tensors)
    assert first == ByteRange(start, record.size_bytes)
    assert second == ByteRange(start + 3 * CHUNK_BYTES, record.size_bytes)
    assert source.fetched_bytes == record.size_bytes - start, "nothing was fetched twice"


def test_a_store_that_always_cuts_is_unavailable_and_publishes_only_what_was_whole(tmp_path: Path) -> None:
    store = CutStore(1, 0)
    record, _ = registered(store)
    tier = HostTier(tmp_path / "tier", 64 * 1024**2)
    with pytest.raises(Unavailable, match="reset"):
        TensorSource(store, tier).read(record, {one.name for one in record.tensors}, 10)
    assert len(store.asked) == 2
    start = min(one.start for one in record.tensors)
    whole = {one.sha256 for one in record.tensors if one.end <= start + CHUNK_BYTES}
    assert set(tier.digests()) == whole
    assert not list((tmp_path / "tier").glob("*/tmp/*")), "what was begun is gone"


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data + b"more"])
def test_another_length_than_the_registered_one_is_corrupt_or_harmless(change) -> None:  # type: ignore[no-untyped-def]
    store = MemoryStore()
    record, weights = registered(store)
    store.put(layout.blob_key(record.digest), change(weights), Overwrite())
    names = {one.name for one in record.tensors}
    if len(change(weights)) < len(weights):
        with pytest.raises(Corrupt, match=r"length|shorter"):
            TensorSource(store).read(record, names, 10)
    else:
        assert read(TensorSource(store), record).keys() == {one.sha256 for one in record.tensors}


def test_a_slow_stream_ends_at_its_deadline() -> None:
    now = 0.0

    class SlowStore(MemoryStore):
        def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
            nonlocal now
            for piece in super().chunks(key, byte_range):
                now += 3.0
                yield piece

    store = SlowStore()
    record, _ = registered(store)
    source = TensorSource(store, clock=lambda: now)
    with pytest.raises(Unavailable, match="in time"):
        source.read(record, {one.name for one in record.tensors}, 10)
    assert now == 12.0, "it did not read on"


def test_what_is_used_once_is_read_from_the_tier_and_not_written_to_it(tmp_path: Path) -> None:
    store = MemoryStore()
    record, weights = registered(store)
    wanted = {one.sha256: weights[one.start : one.end] for one in record.tensors}
    tier = HostTier(tmp_path / "tier", 64 * 1024**2)
    once = TensorSource(store, tier, keeps=lambda asked: asked.digest != record.digest)
    assert read(once, record) == wanted
    assert not any(tier.has(digest) for digest in wanted)
    assert read(TensorSource(store, tier), record) == wanted, "another process keeps it"
    before = once.fetched_bytes
    found = once.read(record, {one.name for one in record.tensors}, 10)
    assert found.tier is Tier.HOST
    assert once.fetched_bytes == before
