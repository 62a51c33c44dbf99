"""Processes and threads on one host tier, killed at random points: nothing is lost, nothing is wrong."""

from __future__ import annotations

import fcntl
import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare.weights.tier_files import PAGE
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import TenantId
from flatshare_registry.stores.local import LocalStore
from flatshare_registry.testing.files import encode_safetensors
from flatshare_registry.weights import TensorSpec

VERSIONS = 12
BUDGET = 1_500_000
KILLS = 10
READS = 100
"""How much must have happened: on a busy machine it takes longer."""

WORKERS = 3

WORKER = """
import hashlib, random, sys, threading
from pathlib import Path
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import TenantId
from flatshare_registry.stores.local import LocalStore
folder, budget, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = LocalStore(folder / "store")
records = Registry(store).list_versions(TenantId("acme"))
source = TensorSource(store, HostTier(folder / "tier", budget))
def work(seed):
    chosen = random.Random(seed)
    held = []
    while True:
        record = chosen.choice(records)
        names = chosen.sample([one.name for one in record.tensors], chosen.randint(1, len(record.tensors)))
        fetched = source.read(record, names, 30)
        for digest, data in fetched.data.items():
            if hashlib.sha256(data).hexdigest() != digest:
                print("WRONG", digest, flush=True)
        held = [*held[-3:], fetched]
        print("ok", flush=True)
for thread in range(2):
    threading.Thread(target=work, args=(seed * 10 + thread,)).start()
"""


def make_store(folder: Path) -> None:
    registry = Registry(LocalStore(folder / "store"))
    registry.create_tenant(TenantId("acme"))
    random_values = np.random.default_rng(0)
    shared = random_values.random((200, 200), dtype=np.float32)  # 160 kB, in every version
    for number in range(VERSIONS):
        own = {f"own{part}": random_values.random(20_000 * (part + 1), dtype=np.float32) for part in range(2)}
        arrays = {"shared": shared, **own, "small": np.full(10, number, dtype=np.float32)}
        specs = {key: TensorSpec("F32", value.shape) for key, value in arrays.items()}
        registry.register(TenantId("acme"), encode_safetensors(arrays), "x", specs)


def bytes_of_files(folder: Path) -> int:
    """Bytes of all files at one instant: nobody can evict, or set more aside, while we hold the count."""
    total = 0
    usage = next((folder / "tier").glob("*/usage"), None)
    handle = usage.open() if usage is not None else None
    if handle is not None:
        fcntl.flock(handle, fcntl.LOCK_EX)
    for path in (folder / "tier").rglob("tensors/*/*"):
        try:
            total += -(-path.stat().st_size // PAGE) * PAGE
        except FileNotFoundError:
            pass  # a second name of the same file is on its way out
    if handle is not None:
        handle.close()
    return total


def start(folder: Path, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(BUDGET), str(seed)],
        stdout=(folder / f"out-{seed}").open("w"), stderr=(folder / f"err-{seed}").open("w"), text=True,
    )  # fmt: skip


def test_killed_at_random_points_nothing_is_lost_or_wrong(tmp_path: Path) -> None:
    make_store(tmp_path)
    chosen = random.Random(20261123)
    workers = [start(tmp_path, seed) for seed in range(WORKERS)]
    seed, kills = WORKERS, 0

    def lines() -> list[str]:
        return [line for out in tmp_path.glob("out-*") for line in out.read_text().splitlines()]

    try:
        while kills < KILLS or lines().count("ok") <= READS:
            victim = chosen.randrange(WORKERS)
            # A random moment is the point of this test; a worker needs a second to start.
            time.sleep(chosen.uniform(0.3, 1.2))
            assert bytes_of_files(tmp_path) <= BUDGET
            assert workers[victim].poll() is None, (tmp_path / f"err-{victim}").read_text()
            workers[victim].kill()
            workers[victim].wait()
            kills += 1
            workers[victim] = start(tmp_path, seed)
            seed += 1
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert not [line for line in lines() if "WRONG" in line]
    assert not [err for err in tmp_path.glob("err-*") if "Traceback" in err.read_text()]
    # Every file is what its name says, the count covers them, and orphans go at the next start.
    for path in (tmp_path / "tier").rglob("tensors/*/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    tier = HostTier(tmp_path / "tier", BUDGET)
    assert tier.usage().used_bytes == bytes_of_files(tmp_path)
    assert list((tmp_path / "tier").rglob("tmp/*")) == []
    # And whatever lock a dead owner left, everything can still be fetched.
    store = LocalStore(tmp_path / "store")
    source = TensorSource(store, tier)
    for record in Registry(store).list_versions(TenantId("acme")):
        fetched = source.read(record, [one.name for one in record.tensors], 5)
        assert {hashlib.sha256(data).hexdigest() for data in fetched.data.values()} == set(fetched.data)
