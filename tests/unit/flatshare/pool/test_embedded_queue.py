"""The consumer's end of the embedded queue: one that goes ends what it has in hand, and takes no more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ray.serve.schema import TaskProcessorConfig

from flatshare.pool.embedded_queue import SqliteTaskAdapter
from flatshare.pool.task_names import RUN
from flatshare.tasks.queue import SqliteQueue
from flatshare.tasks.records import TaskId
from flatshare_registry import TenantId


class World:
    def __init__(self, path: Path) -> None:
        self.queue = SqliteQueue(path)
        self.ran: list[str] = []
        self.running, self.go_on = asyncio.Event(), asyncio.Event()
        self.adapter = SqliteTaskAdapter(
            TaskProcessorConfig(queue_name="q", adapter_config={"path": str(path)})
        )
        self.adapter.initialize(1)
        self.adapter.register_task_handle(self.run, RUN)
        self.adapter.start_consumer()

    async def run(self, task: str) -> None:
        self.ran.append(task)
        self.running.set()
        await self.go_on.wait()


@pytest.fixture
async def world(tmp_path: Path) -> World:
    world = World(tmp_path / "q.sqlite")
    for _ in range(2):
        world.queue.put(TaskId.new(TenantId("acme")))
    await asyncio.wait_for(world.running.wait(), 5)
    return world


async def test_one_that_goes_ends_what_it_has_in_hand_and_takes_no_more(world: World) -> None:
    draining = asyncio.create_task(world.adapter.drain(5))
    await asyncio.sleep(0)
    assert not draining.done() and world.adapter.failed is None
    world.go_on.set()
    await asyncio.wait_for(draining, 5)
    assert (len(world.ran), world.queue.length().tasks, world.queue.backlog().due) == (1, 1, 1)


async def test_what_does_not_end_in_time_is_left_to_another(world: World) -> None:
    await asyncio.wait_for(world.adapter.drain(0.05), 5)
    await asyncio.wait(world.adapter._workers, timeout=5)
    assert world.queue.backlog().under_way == 1, "until its lease ends"


async def test_a_task_that_breaks_its_run_is_held_back_and_the_others_go_on(tmp_path: Path) -> None:
    world = World(tmp_path / "q.sqlite")
    ran = asyncio.Event()

    async def run(task: str) -> None:
        world.ran.append(task)
        if len(world.ran) == 1:
            raise KeyError("nobody thought of it")
        ran.set()

    world.adapter.register_task_handle(run, RUN)
    for _ in range(2):
        world.queue.put(TaskId.new(TenantId("acme")))
    await asyncio.wait_for(ran.wait(), 5)
    assert world.adapter.failed is None
    await world.adapter.drain(5)
    assert world.queue.length().tasks == 1, "it is tried again later"
