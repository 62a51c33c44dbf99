"""The embedded queue: leases, turns of tenants, and several processes' worth of threads on one file."""

from __future__ import annotations

import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flatshare.tasks.queue import LEASE_S, SqliteQueue
from flatshare.tasks.records import TaskId
from flatshare_registry import TenantId
from flatshare_registry.errors import Unavailable
from flatshare_registry.testing.faults import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def queue(tmp_path: Path, clock: ManualClock) -> SqliteQueue:
    return SqliteQueue(tmp_path / "q" / "tasks.sqlite", clock)


def new(tenant: str = "acme") -> TaskId:
    return TaskId.new(TenantId(tenant))


def test_a_claim_is_a_lease_that_ends_unless_it_is_renewed(queue: SqliteQueue, clock: ManualClock) -> None:
    task = new()
    queue.put(task)
    assert (queue.claim(), queue.claim()) == (task, None)
    clock.advance(LEASE_S - 1)
    queue.renew(task)
    clock.advance(LEASE_S - 1)
    assert queue.claim() is None
    clock.advance(2)
    assert queue.claim() == task, "its process died"
    queue.done(task)
    clock.advance(100)
    assert queue.claim() is None


def test_what_is_given_back_waits_and_what_is_there_is_not_put_twice(
    queue: SqliteQueue, clock: ManualClock
) -> None:
    task = new()
    queue.put(task)
    queue.claim()
    queue.put(task)
    assert queue.claim() is None, "a sweep must not free what runs"
    queue.back(task, 5)
    assert queue.claim() is None
    clock.advance(5)
    assert queue.claim() == task
    assert queue.length().tasks == 1


def test_the_tenant_with_the_fewest_under_way_is_next(queue: SqliteQueue, clock: ManualClock) -> None:
    for _ in range(50):
        queue.put(new("flood"))
        clock.advance(0.001)
    for name in ("quiet", "calm"):
        queue.put(new(name))
        clock.advance(0.001)
    first = [claimed.tenant for _ in range(5) if (claimed := queue.claim())]
    assert first == ["flood", "quiet", "calm", "flood", "flood"]
    assert (queue.length("flood").of_tenant, queue.length("quiet").of_tenant) == (50, 1)
    queue.forget_tenant("flood")
    assert queue.length("flood").of_tenant == 0


def test_nobody_claims_what_another_one_has(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite"
    put = SqliteQueue(path)
    tasks = [new(f"t{number % 3}") for number in range(60)]
    for task in tasks:
        put.put(task)

    def work(_: int) -> list[TaskId]:
        queue, mine = SqliteQueue(path), []
        while (task := queue.claim()) is not None:
            mine.append(task)
            queue.done(task)
        return mine

    with ThreadPoolExecutor(4) as threads:
        found = Counter(task for part in threads.map(work, range(4)) for task in part)
    assert found == Counter(tasks)


def test_the_file_is_this_users_alone_and_a_damaged_one_says_so(tmp_path: Path, queue: SqliteQueue) -> None:
    mode = stat.S_IMODE(os.stat(tmp_path / "q" / "tasks.sqlite").st_mode)
    assert mode == 0o600
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(Unavailable, match="the queue of tasks does not work"):
        SqliteQueue(tmp_path / "bad.sqlite")
