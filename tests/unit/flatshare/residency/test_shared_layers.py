"""A thousand tenants that differ in their head alone, resident at once: what they cost, and that they are right."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save

from flatshare.device.cpu import CpuDevice
from flatshare.engine.passes import forward
from flatshare.models.architecture import architecture
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.weights.device_loader import DeviceLoader
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare_registry import layout
from flatshare_registry.records import VersionRecord, utc
from flatshare_registry.stores.base import BlobMeta, ByteRange, StoredBlob
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.weights import describe

NETWORK = architecture("mnist-resnet18")
TENANTS = 1000
GROWTH_BYTES = 300 * 1024**2
HEAD = ("fc.weight", "fc.bias")


class HeadStore(MemoryStore):
    """Serves 1,000 files of 45 MB that share all but 20 kB, without keeping 45 GB: base bytes and a head."""

    def __init__(self, base: bytes, starts: dict[str, int]) -> None:
        super().__init__()
        self.base = base
        self.starts = starts
        self.heads: dict[str, dict[str, bytes]] = {}
        self.served = 0

    def get(self, key: str, byte_range: ByteRange | None = None) -> StoredBlob:
        head = self.heads[key]
        start, end = (byte_range.start, byte_range.end) if byte_range else (0, len(self.base))
        data = bytearray(self.base[start:end])
        for name, value in head.items():
            first = max(self.starts[name], start)
            last = min(self.starts[name] + len(value), end)
            if first < last:
                data[first - start : last - start] = value[
                    first - self.starts[name] : last - self.starts[name]
                ]
        self.served += len(data)
        return StoredBlob(bytes(data), BlobMeta(key, '"x"', len(self.base), 0.0))


def records(
    store: HeadStore, template: VersionRecord
) -> Iterator[tuple[VersionRecord, dict[str, np.ndarray]]]:
    random = np.random.default_rng(5)
    for number in range(TENANTS):
        head = {
            "fc.weight": random.standard_normal((10, 512), dtype=np.float32),
            "fc.bias": random.standard_normal(10, dtype=np.float32),
        }
        raw = {name: value.tobytes() for name, value in head.items()}
        tensors = tuple(
            one.model_copy(update={"sha256": hashlib.sha256(raw[one.name]).hexdigest()})
            if one.name in raw
            else one
            for one in template.tensors
        )
        digest = hashlib.sha256(b"".join(raw.values())).hexdigest()
        store.heads[layout.blob_key(digest)] = raw
        yield template.model_copy(update={"tenant": f"t{number}", "digest": digest, "tensors": tensors}), head


async def test_a_thousand_head_only_tenants_fit_in_300_mb_and_are_right(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = NETWORK.build()
    base = save({key: value.contiguous() for key, value in module.state_dict().items()})
    described = describe(base)
    template = VersionRecord(
        tenant="base", version=1, architecture=NETWORK.name, digest=described.digest,
        size_bytes=described.size_bytes, tensors=described.tensors, created_at=utc(0), created_by="test",
    )  # fmt: skip
    store = HeadStore(base, {one.name: one.start for one in described.tensors})
    source = TensorSource(store, HostTier(tmp_path, 10**9))
    with ThreadPoolExecutor(2) as threads:
        loader = DeviceLoader(source, CpuDevice(), threads, threads)
        cache = ModelCache(ledger=Ledger(TENANTS, 100 * 1024**2), loader=loader)
        gc.collect()
        before = psutil.Process().memory_info().rss
        heads = []
        for record, head in records(store, template):
            (await cache.lease(record, 30)).release()
            heads.append((record, head))
        gc.collect()
        growth = psutil.Process().memory_info().rss - before
        assert (cache.occupied, cache.stats.evictions) == (TENANTS, 0)
        own = sum(one.size_bytes for one in template.tensors if one.name in HEAD)
        assert own < 21_000
        assert cache.ledger.held_bytes <= described.size_bytes + TENANTS * own
        assert {info.own_bytes for info in cache.snapshot()} == {own}
        # One fetch of the base; then each head's own bytes.
        assert store.served <= described.size_bytes + TENANTS * (own + 1024)
        assert growth < GROWTH_BYTES, f"{growth / 1e6:.0f} MB for {TENANTS} tenants"

        # Right answers, all in one pass over the shared layers, checked against heads applied here.
        rows = torch.rand(1, 1, 28, 28) * 2 - 1
        leases = [await cache.lease(record, 5) for record, _ in heads[:50]]
        features = torch.nn.Sequential(*list(module.children())[:-1])
        with torch.inference_mode():
            shared = features(rows)[0].numpy()
            together = forward([lease.model for lease in leases], [rows] * len(leases))
            for lease, logits, (_, head) in zip(leases, together, heads, strict=False):
                wanted = head["fc.weight"] @ shared + head["fc.bias"]
                np.testing.assert_allclose(logits[0].numpy(), wanted, rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(lease.model(rows)[0].numpy(), wanted, rtol=1e-4, atol=1e-4)
            for record, head in heads[50:]:
                with await cache.lease(record, 5) as lease:
                    found = lease.model.stages[-1](torch.from_numpy(shared[None]))[0].numpy()
                np.testing.assert_allclose(
                    found, head["fc.weight"] @ shared + head["fc.bias"], rtol=1e-4, atol=1e-4
                )
        for lease in leases:
            lease.release()
    print(
        f"{TENANTS} tenants: {growth / 1e6:.0f} MB of growth, {cache.ledger.held_bytes / 1e6:.1f} MB of tensors"
    )
