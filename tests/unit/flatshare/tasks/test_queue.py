"""The embedded queue: leases, turns of tenants, and several processes' worth of threads on one file."""

from __future__ import annotations

import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flatshare.placement.consumers import Backlog
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
    first = queue.claim()
    assert first is not None and first.task == task and queue.claim() is None
    clock.advance(LEASE_S - 1)
    queue.renew(first)
    clock.advance(LEASE_S - 1)
    assert queue.claim() is None
    clock.advance(2)
    second = queue.claim()
    assert second is not None and second.task == task, "its process died"
    for late in (lambda: queue.done(first), lambda: queue.back(first, 0), lambda: queue.renew(first)):
        late()
        assert queue.claim() is None, "it did not die, and changes nothing any more"
    queue.done(second)
    clock.advance(100)
    assert queue.claim() is None


def test_a_file_that_was_lost_is_made_anew_by_who_has_it_open(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite"
    puts, claims = SqliteQueue(path), SqliteQueue(path)
    puts.put(new())
    claims.claim()
    for file in tmp_path.glob("tasks.sqlite*"):
        file.unlink()
    task = new()
    puts.put(task)
    found = claims.claim()
    assert found is not None and found.task == task and puts.length().tasks == 1


def test_what_is_given_back_waits_and_what_is_there_is_not_put_twice(
    queue: SqliteQueue, clock: ManualClock
) -> None:
    task = new()
    queue.put(task)
    claim = queue.claim()
    assert claim is not None
    queue.put(task)
    assert queue.claim() is None, "a sweep must not free what runs"
    queue.back(claim, 5)
    assert queue.claim() is None
    clock.advance(5)
    again = queue.claim()
    assert again is not None and again.task == task
    assert queue.length().tasks == 1


def test_the_tenant_with_the_fewest_under_way_is_next(queue: SqliteQueue, clock: ManualClock) -> None:
    for _ in range(50):
        queue.put(new("flood"))
        clock.advance(0.001)
    for name in ("quiet", "calm"):
        queue.put(new(name))
        clock.advance(0.001)
    first = [claim.task.tenant for _ in range(5) if (claim := queue.claim())]
    assert first == ["flood", "quiet", "calm", "flood", "flood"]
    assert (queue.length("flood").of_tenant, queue.length("quiet").of_tenant) == (50, 1)


def test_nobody_claims_what_another_one_has(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite"
    put = SqliteQueue(path)
    tasks = [new(f"t{number % 3}") for number in range(60)]
    for task in tasks:
        put.put(task)

    def work(_: int) -> list[TaskId]:
        queue, mine = SqliteQueue(path), []
        while (claim := queue.claim()) is not None:
            mine.append(claim.task)
            queue.done(claim)
        return mine

    with ThreadPoolExecutor(4) as threads:
        found = Counter(task for part in threads.map(work, range(4)) for task in part)
    assert found == Counter(tasks)


def test_the_file_is_this_users_alone_and_a_damaged_one_says_so(tmp_path: Path, queue: SqliteQueue) -> None:
    queue.put(new())
    mode = stat.S_IMODE(os.stat(tmp_path / "q" / "tasks.sqlite").st_mode)
    assert mode == 0o600
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(Unavailable, match="the queue of tasks does not work"):
        SqliteQueue(tmp_path / "bad.sqlite").put(new())


def test_the_backlog_counts_what_is_due_and_what_is_in_hand(queue: SqliteQueue, clock: ManualClock) -> None:
    assert queue.backlog() == Backlog(0, 0, 0.0) and queue.backlog().quiet
    for delay_s in (0, 0, 30):
        queue.put(new(), delay_s)
    clock.advance(7)
    assert queue.backlog() == Backlog(2, 0, 7.0)
    assert queue.claim() is not None
    assert queue.backlog() == Backlog(1, 1, 7.0)
    clock.advance(24)
    assert queue.backlog() == Backlog(3, 0, 31.0), "a lease that ended, and one that was held back"
