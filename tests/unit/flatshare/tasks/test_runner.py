"""One run of a task: what ends it, what is tried again, and whose right is looked at once more."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from flatshare.tasks.records import TaskId, TaskRecord, TaskState
from flatshare.tasks.runner import MOST_FAILURES, MOST_REFUSALS_S, Asked, Reply, TaskRunner
from flatshare.tasks.store import TaskStore
from flatshare_registry import Registry, Scope, TenantId
from flatshare_registry.errors import NotFound, Unavailable
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock

ACME = TenantId("acme")
GOOD = Reply(
    200, {"content-type": "application/json", "x-flatshare-version": "7", "x-flatshare-digest": "d"}, b"[1]"
)


def refusal(status: int, code: str = "x") -> Reply:
    return Reply(status, {}, json.dumps({"error": {"message": f"it is {code}", "code": code}}).encode())


class World:
    def __init__(self) -> None:
        self.clock = ManualClock()
        blobs = MemoryStore(clock=self.clock)
        self.registry = Registry(blobs, clock=self.clock)
        self.registry.create_tenant(ACME)
        self.key = self.registry.tenancy.create_key(ACME, [Scope.PREDICT]).id
        self.store = TaskStore(blobs, 10**6, self.clock)
        self.replies: list[Reply | Exception | Callable[[], Reply]] = []
        self.asked: list[Asked] = []
        self.runner = TaskRunner(self.store, self.registry.head, self._ask, self.clock)
        self.task = TaskId.new(ACME)
        self.store.take(
            self.task, "/classify", "acme:canary", {"content-type": "image/png"}, b"png", "key:k", self.key
        )

    async def _ask(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        reply: Any = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, Reply) else reply()

    async def run(self, *replies: Reply | Exception | Callable[[], Reply]) -> list[float | None]:
        self.replies = list(replies)
        return [await self.runner.run(self.task) for _ in replies]

    @property
    def record(self) -> TaskRecord:
        return self.store.read(self.task)


@pytest.fixture
def world() -> World:
    return World()


async def test_an_answer_names_its_version_and_is_kept(world: World) -> None:
    assert await world.run(GOOD) == [None]
    record = world.record
    assert record.state is TaskState.DONE and record.answer is not None
    assert (record.answer.version, record.answer.digest, record.error) == (7, "d", None)
    assert world.store.answer(world.task, record.answer.fence) == b"[1]"
    assert world.asked == [
        Asked("/classify", "acme:canary", {"content-type": "image/png"}, b"png", world.task.ulid)
    ]
    assert await world.runner.run(world.task) is None, "a second delivery runs nothing"
    assert len(world.asked) == 1


async def test_what_is_the_requests_fault_ends_it_at_once(world: World) -> None:
    assert await world.run(refusal(400, "bad_input")) == [None]
    assert (world.record.state, world.record.code, world.record.error) == (
        TaskState.FAILED, "bad_input", "it is bad_input",
    )  # fmt: skip


async def test_a_500_is_tried_again_and_is_dead_after_its_tries(world: World) -> None:
    delays = await world.run(*[refusal(500, "model_failed")] * MOST_FAILURES)
    assert delays[-1] is None and all(delay for delay in delays[:-1])
    assert delays[3] is not None and delays[0] is not None and delays[3] > delays[0], "longer each time"
    assert (world.record.state, world.record.error) == (TaskState.DEAD, "it is model_failed")
    world.store.replay(world.task)
    assert await world.run(GOOD) == [None]
    assert world.record.state is TaskState.DONE


async def test_no_room_is_no_fault_and_has_an_end(world: World) -> None:
    busy = [refusal(503, "overloaded"), refusal(429, "over"), Unavailable("down"), RuntimeError("actor died")]
    assert None not in await world.run(*busy * 5)
    assert (world.record.state, world.record.failures) == (TaskState.QUEUED, 0)
    assert "down" not in str(world.record.error), "a store's address is not for the sender"
    world.clock.advance(MOST_REFUSALS_S + 1)
    assert await world.run(busy[0]) == [None]
    assert world.record.state is TaskState.DEAD
    world.store.replay(world.task)
    assert None not in await world.run(busy[0]), "a replay has all its time"


async def test_a_task_that_kills_who_runs_it_ends_as_a_dead_letter(world: World) -> None:
    for number in range(MOST_FAILURES):
        world.store.begin(world.task, f"killed-{number}")
    assert await world.run(GOOD) == [None]
    assert (world.record.state, world.asked) == (TaskState.DEAD, [])
    assert "died each time" in str(world.record.error)


async def test_who_lost_the_right_meanwhile_is_not_answered(world: World) -> None:
    world.registry.tenancy.revoke_key(ACME, world.key)
    assert await world.run(GOOD) == [None]
    assert (world.record.state, world.record.code, world.asked) == (TaskState.FAILED, "forbidden", [])


async def test_a_suspended_tenants_task_is_refused(world: World) -> None:
    world.registry.tenancy.suspend(ACME)
    assert await world.run(GOOD) == [None]
    assert (world.record.state, world.asked) == (TaskState.FAILED, [])


@pytest.mark.parametrize("comes_back", [False, True])
async def test_a_tenants_tasks_go_with_it_and_are_never_another_ones(world: World, comes_back: bool) -> None:
    late, since = TaskId.new(ACME), world.registry.head(ACME).created_at
    world.clock.advance(10)
    world.registry.delete_tenant(ACME)
    with pytest.raises(NotFound):
        world.store.read(world.task)
    if comes_back:
        world.clock.advance(10)
        world.registry.create_tenant(ACME)
    # Of a request that was let in before, and whose body came after.
    world.store.take(late, "/predict", "acme", {}, b"{}", "operator:o", None, owner_since=since)
    world.replies = [GOOD]
    assert await world.runner.run(late) is None
    assert world.asked == []
    with pytest.raises(NotFound):
        world.store.read(late)
    assert list(world.store.open()) == []


async def test_an_operators_task_needs_no_key_of_the_tenants(world: World) -> None:
    task = TaskId.new(ACME)
    world.store.take(task, "/predict", "acme", {}, b"{}", "operator:o", None)
    world.replies = [GOOD]
    assert await world.runner.run(task) is None
    assert world.store.read(task).state is TaskState.DONE


async def test_what_is_erased_while_it_runs_leaves_nothing(world: World) -> None:
    def erase() -> Reply:
        world.store.drop(world.task)
        return GOOD

    assert await world.run(erase) == [None]
    assert list(world.store.open()) == []


async def test_a_pinned_version_is_asked_for(world: World) -> None:
    task = TaskId.new(ACME)
    since = world.registry.head(ACME).created_at
    world.clock.advance(-5)  # the machine that takes it is behind the one that made the tenant
    world.store.take(
        task, "/predict", "acme", {}, b"{}", "operator:o", None, owner_since=since, pinned="acme@3"
    )
    world.replies = [GOOD]
    assert await world.runner.run(task) is None
    assert world.asked[-1].ref == "acme@3" and world.store.read(task).state is TaskState.DONE
