"""Seeded faults of the store under the real fetch and the real host tier: right bytes or a clear error, nothing else.

The store refuses, cuts answers short, flips bits, gives too little or too much, and stalls between two pieces, as
each seed has it, while three threads read versions that overlap. ``FLATSHARE_TEST_SEEDS=100000`` runs more.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flatshare.weights import fetch
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import ByteRange
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.files import encode_safetensors
from flatshare_registry.weights import TensorSpec

SEEDS = int(os.environ.get("FLATSHARE_TEST_SEEDS", "2000"))
SEEDS_A_TIER = 100
READS = 3
THREADS = 3
BUDGET = 300_000
"""Of the tier: less than half of all versions together, so that files are evicted all the time."""


class HostileStore(MemoryStore):
    """Weights come as a seed has it; records come as they are."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__()
        self.inner = inner
        self.chosen = random.Random(0)
        self.lock = threading.Lock()
        self.fates: Counter[str] = Counter()

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        data = self.inner.get(key, byte_range).data
        with self.lock:  # the order of the threads is theirs; what each is given is the seed's
            fate = self.chosen.choice(["good"] * 4 + ["refused", "cut", "flipped", "short", "long", "stalls"])
            at = self.chosen.randrange(len(data))
            self.fates[fate] += 1
        if fate == "refused":
            raise Unavailable("the store is down")
        if fate == "flipped":
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if fate == "long":
            data += b"more"
        end = at if fate in ("cut", "short") else len(data)
        for start in range(0, end, 20_000):
            if fate == "stalls":
                os.sched_yield()
            yield data[start : min(start + 20_000, end)]
        if fate == "cut":
            raise Unavailable("the connection was reset")


@pytest.fixture(scope="module")
def versions() -> tuple[MemoryStore, list[VersionRecord]]:
    """Twelve versions: each has a tensor of its own, one that a third of them have, and one that all have."""
    store = MemoryStore()
    registry = Registry(store)
    registry.create_tenant(TenantId("acme"))
    values = np.random.default_rng(0)
    base = values.random(20_000, dtype=np.float32)
    thirds = [values.random(17_000, dtype=np.float32) for _ in range(3)]
    for number in range(12):
        arrays = {
            "base": base, "third": thirds[number % 3], "own": values.random(9_000 + number, dtype=np.float32),
            "small": np.full(3, number, dtype=np.float32),
        }  # fmt: skip
        specs = {name: TensorSpec("F32", array.shape) for name, array in arrays.items()}
        registry.register(TenantId("acme"), encode_safetensors(arrays), "x", specs)
    return store, registry.list_versions(TenantId("acme"))


def test_right_bytes_or_a_clear_error(
    versions: tuple[MemoryStore, list[VersionRecord]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RETRY_S", 0.0)
    inner, records = versions
    store = HostileStore(inner)
    seen: Counter[str] = Counter()

    def read(source: TensorSource, seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(READS):
            record = chosen.choice(records)
            names = chosen.sample([one.name for one in record.tensors], chosen.randint(1, 4))
            wanted = {one.sha256 for one in record.tensors if one.name in names}
            try:
                fetched = source.read(record, names, 30)
            except (Unavailable, Corrupt) as error:
                seen[type(error).__name__] += 1
                continue
            assert set(fetched.data) == wanted, seed
            for digest, data in fetched.data.items():
                assert hashlib.sha256(data).hexdigest() == digest, f"seed {seed}"
            seen[fetched.tier.value] += 1

    with ThreadPoolExecutor(THREADS) as threads:
        for first in range(0, SEEDS, SEEDS_A_TIER):
            folder = tmp_path / str(first)
            sources = [TensorSource(store, HostTier(folder, BUDGET)) for _ in range(THREADS)]
            for seed in range(first, first + SEEDS_A_TIER):
                store.chosen = random.Random(seed)
                list(threads.map(read, sources, [seed * THREADS + one for one in range(THREADS)]))
            gc.collect()
            for path in folder.rglob("tensors/*/*"):
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, first
            assert not list(folder.rglob("tmp/*")), "what was begun is gone"
            usage = HostTier(folder, BUDGET).usage()
            assert usage.used_bytes <= BUDGET
    for outcome in ("Unavailable", "Corrupt", "host", "store"):
        assert seen[outcome] > SEEDS // 50, (outcome, seen, store.fates)
    assert store.fates["stalls"] and store.fates["long"]
