"""What another node's host tier saves of a cold load: the same version from a peer's door, and from a store.

The store takes 20 ms until a GET begins and then gives 100 MB/s (options); the peer is a replica's own door in
a process of its own, over loopback. Both are hashed and written to this node's tier. Turn by turn, so that what
else this machine does falls on both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
import uvicorn
from rich.progress import track
from safetensors.torch import save

from flatshare.cli.output import err, print_table
from flatshare.door.peers import TierServer
from flatshare.models.architecture import architecture
from flatshare.threads import ThreadWork
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare.weights.peers import Peer, PeerTiers
from flatshare.weights.tiers import Tier
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import TenantId
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import ByteRange
from flatshare_registry.stores.memory import MemoryStore

NAMES = ("mnist-cnn", "mnist-resnet18")
KEY = b"a key of this bench only"
TIER_BYTES = 512 * 1024**2
THREADS = 4


class SlowStore(MemoryStore):
    """A store some way off: so long until the first byte, then so many bytes a second, for each GET."""

    def __init__(self, first_s: float, bytes_per_s: float) -> None:
        super().__init__()
        self.first_s = first_s
        self.bytes_per_s = bytes_per_s

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        due = time.perf_counter() + self.first_s
        for piece in super().chunks(key, byte_range):
            due += len(piece) / self.bytes_per_s
            time.sleep(max(due - time.perf_counter(), 0))
            yield piece


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as a document")
    parser.add_argument("--first-ms", type=float, default=20, help="until the first byte of a GET")
    parser.add_argument("--mb-per-s", type=float, default=100, help="of one GET")
    parser.add_argument("--loads", type=int, default=15, help="of each kind; the median counts")
    options = parser.parse_args()
    store = SlowStore(options.first_ms / 1e3, options.mb_per_s * 1e6)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name in NAMES:
            record = registered(store, name)
            other = HostTier(Path(folder, name, "other"), TIER_BYTES)
            names = {one.name for one in record.tensors}
            TensorSource(store, other).read(record, names, 60)
            mine, theirs = multiprocessing.Pipe()
            door = multiprocessing.get_context("spawn").Process(
                target=serve, args=(theirs, Path(folder, name, "other")), daemon=True
            )
            door.start()
            try:
                peer = Peer("127.0.0.1", mine.recv())
                times = measured(store, record, Path(folder, name), peer, options.loads)
            finally:
                door.terminate()
                door.join()
            size = sum(one.size_bytes for one in record.tensors)
            rows.append({"network": name, "MB": round(size / 1e6, 1), **times})
    print_table("a cold load", ["network", *(f"{key}#" for key in list(rows[0])[1:])], [tuple(str(value) for value in row.values()) for row in rows])  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"store_first_ms": options.first_ms, "store_mb_per_s": options.mb_per_s, "loads": rows}, indent=1) + "\n")  # fmt: skip
    return 0


def registered(store: MemoryStore, name: str) -> VersionRecord:
    torch.manual_seed(1)
    net = architecture(name)
    registry = Registry(store)
    registry.create_tenant(TenantId(name))
    return registry.register(TenantId(name), save(dict(net.build().state_dict())), name, net.tensors).version


def measured(
    store: MemoryStore, record: VersionRecord, folder: Path, peer: Peer, loads: int
) -> dict[str, float]:
    """Medians and worst of loads into an empty tier, in ms."""
    names = {one.name for one in record.tensors}
    times: dict[Tier, list[float]] = {Tier.PEER: [], Tier.STORE: []}
    with ThreadPoolExecutor(THREADS) as threads:
        for number in track(range(2 * loads), record.name, console=err, transient=True):
            tier = HostTier(folder / "mine", TIER_BYTES)
            wanted = (Tier.PEER, Tier.STORE)[number % 2]
            peers = PeerTiers(lambda: KEY, lambda tenant: [peer]) if wanted is Tier.PEER else None
            source = TensorSource(store, tier, threads, peers=peers)
            began = time.perf_counter()
            found = source.read(record, names, 60)
            times[wanted].append((time.perf_counter() - began) * 1e3)
            if found.tier is not wanted:
                raise SystemExit(f"{record.name} came from {found.tier}, not from {wanted}")
            del found
            tier.scrub(tier.digests())
    return {
        f"{tier.value} ms {what}": round(value, 1)
        for tier, took in times.items()
        for what, value in (("p50", statistics.median(took)), ("worst", max(took)))
    }


def serve(parent: Connection, folder: Path) -> None:
    """A door with nothing behind it but the tier."""
    app = TierServer(HostTier(folder, TIER_BYTES), ThreadWork(), lambda: KEY)
    config = uvicorn.Config(cast("Any", app), port=0, lifespan="off", log_level="warning", ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connections wait from here on
        parent.send(listener.getsockname()[1])
        asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    sys.exit(main())
