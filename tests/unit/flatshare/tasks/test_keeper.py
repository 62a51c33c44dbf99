"""Who tends tasks: finds what the queue lost, and has as many consumers as the queue needs."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from flatshare.placement.consumers import OLD_S, Backlog
from flatshare.placement.scaling import Bounds
from flatshare.pool.embedded_queue import EmbeddedQueue
from flatshare.tasks.keeper import TaskKeeper
from flatshare.tasks.records import TaskId, TaskState
from flatshare.tasks.store import TaskStore
from flatshare_registry import TenantId
from flatshare_registry.errors import Unavailable
from flatshare_registry.stores.base import Create
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock

BOUNDS = Bounds(0, 5, upscale_delay_s=2, downscale_delay_s=30, idle_s=30)


class Serve:
    def __init__(self) -> None:
        self.consumers = 1
        self.changes: list[int] = []

    def wanted(self) -> int:
        return self.consumers

    def scale(self, replicas: int) -> None:
        self.consumers = replicas
        self.changes.append(replicas)


class Queue:
    def __init__(self) -> None:
        self.now: Backlog | None = Backlog()

    def backlog(self) -> Backlog:
        if self.now is None:
            raise Unavailable("away")
        return self.now


class World:
    def __init__(self) -> None:
        self.serve, self.queue, self.clock = Serve(), Queue(), ManualClock()
        queue: Any = self.queue
        self.keeper = TaskKeeper(TaskStore(MemoryStore()), queue, self.serve, BOUNDS, 4, 45.0, self.clock)

    async def pass_s(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.advance(1)
            await self.keeper.tick()


@pytest.fixture
def world() -> World:
    return World()


async def test_consumers_come_with_the_queue_and_go_to_zero_after_it(world: World) -> None:
    world.queue.now = Backlog(200, 4, 1.0)
    await world.pass_s(4)
    assert world.serve.changes == [5]
    world.queue.now = Backlog(3, 1, 1.0)
    await world.pass_s(60)
    assert world.serve.changes == [5], "one that goes would cut off what it runs"
    world.queue.now = Backlog()
    await world.pass_s(29)
    assert world.serve.changes == [5, 1]
    await world.pass_s(3)
    assert world.serve.changes == [5, 1, 0]
    world.queue.now = Backlog(1, 0, 0.2)
    await world.pass_s(1)
    assert world.serve.changes == [5, 1, 0, 1], "the first task waits for no delay"


async def test_old_tasks_want_more_than_young_ones(world: World) -> None:
    world.queue.now = Backlog(8, 4, 1.0)
    await world.pass_s(10)
    assert world.serve.consumers == 1
    world.queue.now = Backlog(8, 4, OLD_S + 1)
    await world.pass_s(4)
    assert world.serve.consumers == 3


async def test_a_queue_that_is_away_changes_nothing_and_is_shown(world: World) -> None:
    await world.pass_s(1)
    world.queue.now = None
    with pytest.raises(Unavailable):
        await world.pass_s(1)
    assert (world.keeper.tended.backlog, world.keeper.tended.consumers) == (None, 1)
    assert world.serve.changes == []


class OldStore:
    """The store, whose markers of open tasks were all written long ago."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def list(self, prefix: str, *, after: str = "") -> object:
        return (dataclasses.replace(meta, modified_s=0.0) for meta in self._store.list(prefix, after=after))


def test_what_the_queue_lost_is_put_again_and_what_is_young_is_not(tmp_path: Path) -> None:
    now, blobs = time.time(), MemoryStore()
    tasks = {
        name: TaskId.new(TenantId("acme"))
        for name in ("lost", "young", "running", "dead run", "ended", "owes")
    }
    for name, task in tasks.items():
        age_s = 5 if name == "young" else 300
        store = TaskStore(blobs, clock=lambda age_s=age_s: now - age_s)
        hook = "https://hooks.acme.com/" if name == "owes" else None
        store.take(task, "/predict", "acme", {}, b"{}", "operator", None, callback=hook)
        if name in ("running", "ended"):
            TaskStore(blobs).begin(task, "f")
        elif name in ("dead run", "owes"):
            store.begin(task, "f")
        if name == "ended":
            TaskStore(blobs).refuse(task, "f", TaskState.DEAD, "x", "x")
        if name == "owes":
            store.refuse(task, "f", TaskState.DEAD, "x", "x")
    queue = EmbeddedQueue(tmp_path / "q.sqlite", 9, 9)
    old: Any = OldStore(blobs)  # markers are as old as their tasks
    keeper = TaskKeeper(TaskStore(old), queue, Serve(), BOUNDS, 4, 45.0)
    keeper.sweep()
    keeper.sweep()
    assert queue.backlog().due == 3
    claimed = {claim.task for _ in range(5) if (claim := queue._queue.claim())}
    assert claimed == {tasks["lost"], tasks["dead run"], tasks["owes"]}


async def test_a_note_whose_task_never_came_to_be_keeps_no_consumer(world: World) -> None:
    """Whoever wrote it got a 503: a broker that counts by the store would call it under way for ten minutes."""
    blobs: Any = world.keeper.store._store
    blobs.put("open-tasks/acme/01JD8ZQ6E4W7YB1R2N9K3M5T0V", b"{}", Create())
    old: Any = OldStore(blobs)
    world.keeper.store = TaskStore(old)
    world.queue.now = Backlog(under_way=1)
    await world.pass_s(40)
    assert world.serve.changes == []
    world.queue.missing_of = lambda tasks: tasks  # type: ignore[attr-defined]
    world.keeper.sweep()
    await world.pass_s(40)
    assert world.serve.changes == [0]
