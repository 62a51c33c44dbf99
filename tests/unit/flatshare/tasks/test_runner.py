"""One run of a task: what ends it, what is tried again, and whose right is looked at once more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from flatshare.tasks.callbacks import CallbackRefused, verify_callback
from flatshare.tasks.records import Callback, CallbackState, TaskId, TaskRecord, TaskState
from flatshare.tasks.runner import MOST_CALLBACKS_S, MOST_FAILURES, MOST_REFUSALS_S, Asked, Reply, TaskRunner
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


class Receiver:
    """Who is told of ends."""

    def __init__(self) -> None:
        self.refusals: list[CallbackRefused] = []
        self.sent: list[tuple[str, dict[str, str], bytes]] = []

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        self.sent.append((url, dict(headers), body))
        if self.refusals:
            raise self.refusals.pop(0)


class World:
    def __init__(self) -> None:
        self.clock = ManualClock()
        blobs = MemoryStore(clock=self.clock)
        self.registry = Registry(blobs, clock=self.clock)
        self.registry.create_tenant(ACME)
        made = self.registry.tenancy.create_key(ACME, [Scope.PREDICT])
        self.key, self.key_text = made.id, made.text
        self.store = TaskStore(blobs, 10**6, self.clock)
        self.replies: list[Reply | Exception | Callable[[], Reply]] = []
        self.asked: list[Asked] = []
        self.receiver = Receiver()
        self.runner = TaskRunner(self.store, self.registry.head, self._ask, self.receiver, self.clock)
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

    def take(self, callback: str) -> None:
        """A task of whose end somebody is told."""
        self.task = TaskId.new(ACME)
        self.store.take(self.task, "/predict", "acme", {}, b"{}", "key:k", self.key, callback=callback)

    @property
    def told(self) -> Callback:
        assert self.record.callback is not None
        return self.record.callback

    @property
    def open(self) -> list[TaskId]:
        return [task for task, _ in self.store.open()]

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


HOOK = "https://hooks.acme.com/done"


async def test_who_asked_is_told_of_the_end_by_a_message_that_the_senders_key_signs(world: World) -> None:
    world.take(HOOK)
    assert await world.run(GOOD) == [None]
    ((url, headers, body),) = world.receiver.sent
    verify_callback(world.key_text, headers, body, world.clock())
    told = json.loads(body)
    assert (url, told["type"]) == (HOOK, "task.done")
    assert headers["webhook-id"].startswith(f"{world.task}.")
    assert told["data"] == {
        "id": str(world.task), "state": "done", "path": "/predict", "model": "acme", "attempts": 1,
        "status": 200, "version": 7, "digest": "d", "result_url": f"/tasks/{world.task}/result",
    }  # fmt: skip
    assert (world.told.state, world.told.attempts) == (CallbackState.DELIVERED, 1)
    assert world.task not in world.open
    assert await world.runner.run(world.task) is None, "a second delivery tells nobody again"
    assert len(world.receiver.sent) == 1


async def test_a_receiver_that_is_away_is_told_later_and_the_task_runs_once(world: World) -> None:
    world.take(HOOK)
    world.receiver.refusals = [CallbackRefused("away"), CallbackRefused("away")]
    (first,) = await world.run(GOOD)
    assert first is not None and (world.told.state, world.told.error) == (CallbackState.OWED, "away")
    assert world.task in world.open, "a queue that forgets it finds it there"
    world.clock.advance(1)
    second = await world.runner.run(world.task)
    assert second is not None and second > first
    assert await world.runner.run(world.task) is None
    assert (world.told.state, world.told.attempts, world.told.error) == (CallbackState.DELIVERED, 3, None)
    assert (len(world.asked), world.task in world.open) == (1, False)
    assert len({body for _, _, body in world.receiver.sent}) == 1, "the same message each time"


@pytest.mark.parametrize("for_good", [True, False])
async def test_a_callback_is_given_up_and_the_answer_stays(world: World, for_good: bool) -> None:
    world.take(HOOK)
    world.receiver.refusals = [CallbackRefused("no", for_good=for_good)] * 2
    await world.run(GOOD)
    if not for_good:
        world.clock.advance(MOST_CALLBACKS_S + 1)
        assert await world.runner.run(world.task) is None
    assert (world.told.state, world.told.error) == (CallbackState.FAILED, "no")
    assert (world.record.state, world.task in world.open) == (TaskState.DONE, False)


async def test_refused_and_dead_tasks_are_told_of_and_cancelled_ones_are_not(world: World) -> None:
    world.take(HOOK)
    await world.run(refusal(400, "bad_input"))
    assert json.loads(world.receiver.sent[-1][2])["data"]["code"] == "bad_input"
    world.store.replay(world.task)
    assert world.told == Callback(url=HOOK), "its next end is told of, too"
    await world.run(*[refusal(500)] * MOST_FAILURES)
    assert json.loads(world.receiver.sent[-1][2])["type"] == "task.dead"
    world.take(HOOK)
    world.store.cancel(world.task)
    assert await world.runner.run(world.task) is None
    assert (len(world.receiver.sent), world.task in world.open) == (2, False)


async def test_nobody_is_told_with_a_key_that_was_taken_away(world: World) -> None:
    world.take(HOOK)
    world.receiver.refusals = [CallbackRefused("away")]
    await world.run(GOOD)
    world.registry.tenancy.revoke_key(ACME, world.key)
    assert await world.runner.run(world.task) is None
    assert (world.told.state, len(world.receiver.sent)) == (CallbackState.FAILED, 1)
    world.take(HOOK)
    world.registry.delete_tenant(ACME)
    assert await world.run(GOOD) == [None]
    assert len(world.receiver.sent) == 1


async def test_a_process_that_dies_before_it_told_leaves_it_to_the_next(world: World) -> None:
    world.take(HOOK)
    world.store.begin(world.task, "f")
    world.store.refuse(world.task, "f", TaskState.DEAD, "x", "x")  # and then it was killed
    assert world.task in world.open
    assert await world.runner.run(world.task) is None
    assert (world.told.state, world.asked) == (CallbackState.DELIVERED, [])


async def test_each_end_of_a_task_is_a_message_of_its_own_and_each_try_of_it_the_same(world: World) -> None:
    world.take(HOOK)
    world.receiver.refusals = [CallbackRefused("away")]
    await world.run(refusal(400, "bad_input"))
    world.clock.advance(2)
    await world.runner.run(world.task)
    world.store.replay(world.task)
    world.clock.advance(2)
    await world.run(GOOD)
    ids = [headers["webhook-id"] for _, headers, _ in world.receiver.sent]
    assert ids[0] == ids[1] != ids[2], "receivers drop what they have had"


async def test_whatever_goes_wrong_with_a_callback_counts_and_comes_to_an_end(world: World) -> None:
    world.take(HOOK)
    surprises: Any = world.receiver
    surprises.refusals = [ValueError("a name that no resolver takes"), KeyError("x")]
    assert (await world.run(GOOD))[0] is not None
    assert await world.runner.run(world.task) is not None
    assert (world.told.attempts, world.told.error) == (2, "the callback was not sent")
    world.clock.advance(MOST_CALLBACKS_S + 1)
    surprises.refusals = [RuntimeError("still")]
    assert await world.runner.run(world.task) is None
    assert world.told.state is CallbackState.FAILED


async def test_a_receiver_that_does_not_answer_takes_one_place_and_not_all(world: World) -> None:
    answering, asked = asyncio.Event(), asyncio.Event()

    async def slow(url: str, headers: Mapping[str, str], body: bytes) -> None:
        asked.set()
        await answering.wait()

    world.receiver.send = slow  # type: ignore[method-assign]
    world.take(HOOK)
    first = world.task
    world.replies = [GOOD, GOOD]
    telling = asyncio.create_task(world.runner.run(first))
    await asyncio.wait_for(asked.wait(), 5)
    world.take(HOOK)
    later = await asyncio.wait_for(world.runner.run(world.task), 5)
    assert later is not None and world.told.attempts == 0, "it is tried a moment later, and its place is free"
    answering.set()
    assert await telling is None
    assert await world.runner.run(world.task) is None


async def test_a_replay_at_the_moment_of_the_end_is_run_soon(world: World) -> None:
    await world.run(refusal(400))
    settle = world.store.settle

    def replayed_meanwhile(task: TaskId, age_s: float) -> object:
        world.store.replay(task)
        return settle(task, age_s)

    world.store.settle = replayed_meanwhile  # type: ignore[method-assign, assignment]
    assert await world.runner.run(world.task) is not None
