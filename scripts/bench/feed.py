"""What the change feed costs: announcements as empty objects, against small shard objects by compare-and-swap.

Writers announce at a steady rate (50/s by default) from as many threads, each announcement due at its own
time; one reader follows, as a replica does, every few seconds. Announcements: one PUT each, and the reader
lists what is new (``StartAfter``, 30 s of overlap). Shards: each holds the changes of the last minute of its
tenants as JSON; a writer reads its shard, adds its own, and swaps, again when it lost; the reader reads all
shards unless they still have their ETags. The ways take turns; the S3 server is moto, in Python, and shares
the cores: its times are worse than S3's, and the same for both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from pool import s3_server

from flatshare.cli.output import err, out, print_table
from flatshare_registry import TenantId
from flatshare_registry.errors import AlreadyExists, Conflict, NotFound
from flatshare_registry.feed import OVERLAP_S, ChangeFeed
from flatshare_registry.settings import RegistrySettings
from flatshare_registry.stores.base import BlobStore, Create, UpdateIf

DAY_S: Final = 86_400
SHARD_S: Final = 60.0
"""Seconds of changes that a shard holds."""


class Objects:
    """One empty object a change."""

    name = "announcements"

    def __init__(self, store: BlobStore) -> None:
        self._feed = ChangeFeed(store, time.time)
        self.write_requests = 0
        self.read_requests = 0

    def write(self, tenant: TenantId, revision: int) -> None:
        self._feed.announce(tenant, revision)
        self.write_requests += 1

    def read(self, since_s: float) -> int:
        found = len(self._feed.since(since_s - OVERLAP_S))
        self.read_requests += found // 1000 + 1
        return found


class Shards:
    """A few objects that all writers change."""

    name = "shards"

    def __init__(self, store: BlobStore, count: int) -> None:
        self._store = store
        self._count = count
        self._etags: dict[int, str] = {}
        self.write_requests = 0
        self.read_requests = 0

    def write(self, tenant: TenantId, revision: int) -> None:
        key = f"shards/{hash(tenant) % self._count:02d}.json"
        while True:
            self.write_requests += 2
            now = time.time()
            try:
                blob = self._store.get(key)
                changes = [one for one in json.loads(blob.data) if one[0] > now - SHARD_S]
                mode: Create | UpdateIf = UpdateIf(blob.meta.etag)
            except NotFound:
                changes, mode = [], Create()
            with contextlib.suppress(Conflict, AlreadyExists):
                self._store.put(key, json.dumps([*changes, (now, tenant, revision)]).encode(), mode)
                return

    def read(self, since_s: float) -> int:
        found = 0
        for number in range(self._count):
            self.read_requests += 1
            key = f"shards/{number:02d}.json"
            with contextlib.suppress(NotFound):
                etag = self._etags.get(number)
                blob = self._store.get(key) if etag is None else self._store.get_unless(key, etag)
                if blob is not None:
                    self._etags[number] = blob.meta.etag
                    found += sum(one[0] >= since_s for one in json.loads(blob.data))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results as a document")
    parser.add_argument("--turns", type=int, default=3, help="turns of each (the median counts)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each turn")
    parser.add_argument("--rate", type=float, default=50.0, help="changes a second, of all writers together")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks of the reader")
    parser.add_argument("--shards", type=int, default=16)
    options = parser.parse_args()
    turns: dict[str, list[dict[str, float]]] = {}
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    with s3_server() as url:
        for turn in range(options.turns):
            for number in (0, 1) if turn % 2 == 0 else (1, 0):
                where = RegistrySettings(store=f"s3://models/{turn}-{number}", s3_endpoint_url=url)
                store = where.open_store()
                way = Objects(store) if number == 0 else Shards(store, options.shards)
                err.print(f"turn {turn + 1} of {options.turns}: {way.name}")
                turns.setdefault(way.name, []).append(measure(way, options))
    found = {
        name: {key: statistics.median(one[key] for one in ones) for key in ones[0]}
        for name, ones in turns.items()
    }
    if options.json:
        options.json.write_text(json.dumps({"rate": options.rate, "ways": found, "turns": turns}, indent=1))
    columns = list(next(iter(found.values())))
    print_table(
        "Change feed",
        ["", *[f"{name}#" for name in found]],
        [[key, *[f"{one[key]:,.1f}" for one in found.values()]] for key in columns],
    )
    out.print(f"median of {options.turns} turns of {options.seconds:g} s, {options.rate:g} changes a second")
    return 0


def measure(way: Objects | Shards, options: argparse.Namespace) -> dict[str, float]:
    """One turn: what writers and the reader saw."""
    took: list[float] = []
    looks: list[tuple[float, float]] = []
    ended = threading.Event()

    def reader() -> None:
        since = time.time()
        while not ended.wait(options.every):
            began, cpu, wall = time.perf_counter(), time.thread_time(), time.time()
            way.read(since)
            looks.append((time.perf_counter() - began, time.thread_time() - cpu))
            since = wall

    def change(number: int, due: float) -> None:
        time.sleep(max(due - time.perf_counter(), 0))  # the load's own clock
        way.write(TenantId(f"tenant-{number % 500}"), number)
        took.append(time.perf_counter() - due)

    thread = threading.Thread(target=reader)
    thread.start()
    start = time.perf_counter() + 0.1
    with ThreadPoolExecutor(int(options.rate)) as writers:
        due = [start + number / options.rate for number in range(int(options.rate * options.seconds))]
        list(writers.map(change, range(len(due)), due))
    ended.set()
    thread.join()
    took.sort()
    changes = len(took)
    return {
        "announce, p50 ms": 1e3 * took[changes // 2],
        "announce, p99 ms": 1e3 * took[int(changes * 0.99)],
        "requests a change": way.write_requests / changes,
        "look, ms": 1e3 * statistics.median(one for one, _ in looks),
        "look, ms of CPU": 1e3 * statistics.median(cpu for _, cpu in looks),
        "requests of a replica a day": way.read_requests / len(looks) * DAY_S / options.every,
    }


if __name__ == "__main__":
    sys.exit(main())
