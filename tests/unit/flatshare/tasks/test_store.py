"""A task's record: one run ends it, whatever others do, and what has not ended can be found."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flatshare.tasks.records import Answered, TaskId, TaskRecord, TaskState
from flatshare.tasks.store import NEVER_TOLD_S, TaskStore
from flatshare_registry import TenantId, layout
from flatshare_registry.errors import Corrupt, InvalidInput, NotFound
from flatshare_registry.stores.base import Create, Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock

ACME = TenantId("acme")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def blobs(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock=clock)


@pytest.fixture
def store(blobs: MemoryStore, clock: ManualClock) -> TaskStore:
    return TaskStore(blobs, 100, clock)


def take(store: TaskStore, tenant: TenantId = ACME, body: bytes = b"{}") -> TaskId:
    task = TaskId.new(tenant)
    store.take(task, "/predict", tenant, {"content-type": "application/json"}, body, "key:k", "k")
    return task


def page(
    store: TaskStore, limit: int, before: str = "", state: TaskState | None = None
) -> tuple[list[str], str | None]:
    records, following = store.list(ACME, limit, before, state)
    return [TaskId.parse(one.id).ulid for one in records], following


def opened(store: TaskStore) -> set[TaskId]:
    return {task for task, _ in store.open()}


def answer(fence: str) -> Answered:
    return Answered(status=200, content_type="application/json", version=7, digest="d", fence=fence)


def test_a_task_is_taken_run_and_answered(store: TaskStore) -> None:
    task = take(store, body=b"input")
    assert (store.read(task).state, store.body(store.read(task))) == (TaskState.QUEUED, b"input")
    assert opened(store) == {task}
    begun = store.begin(task, "f1")
    assert begun is not None and (begun.state, begun.attempts) == (TaskState.RUNNING, 1)
    assert store.finish(task, "f1", answer("f1"), b"result")
    record = store.read(task)
    assert (record.state, record.answer) == (TaskState.DONE, answer("f1"))
    assert store.answer(task, "f1") == b"result"
    assert opened(store) == set()
    assert store.begin(task, "f2") is None, "there is nothing to run any more"
    assert TaskRecord.decode(record.encode(), "k") == record


def test_of_two_runs_the_later_one_ends_it_and_the_others_answer_is_dropped(
    store: TaskStore, blobs: MemoryStore
) -> None:
    task = take(store)
    store.begin(task, "dead")
    store.begin(task, "f2")  # the first one's process was killed, or hangs
    assert not store.finish(task, "dead", answer("dead"), b"old")
    assert not store.again(task, "dead", "late", "busy", failed=False)
    assert not store.refuse(task, "dead", TaskState.DEAD, "late", "dead")
    assert store.finish(task, "f2", answer("f2"), b"new")
    assert store.read(task).attempts == 2
    keys = [meta.key for meta in blobs.list(layout.tasks_prefix(ACME))]
    assert [key for key in keys if "answer" in key] == [layout.task_key(ACME, task.ulid, "answer-f2")]


def test_where_no_lease_says_so_a_young_run_is_left_alone(store: TaskStore, clock: ManualClock) -> None:
    task = take(store)
    assert store.begin(task, "f1", 45) is not None
    clock.advance(44)
    assert store.begin(task, "f2", 45) is None, "delivered twice: the first run is under way"
    clock.advance(1)
    assert store.begin(task, "f2", 45) is not None, "it has died"


def test_many_at_once_end_it_once(store: TaskStore) -> None:
    task = take(store)
    gate = threading.Barrier(8)

    def run(number: int) -> bool:
        gate.wait()
        fence = f"f{number}"
        store.begin(task, fence)
        return store.finish(task, fence, answer(fence), str(number).encode())

    with ThreadPoolExecutor(8) as threads:
        ended = list(threads.map(run, range(8)))
    assert sum(ended) == 1
    record = store.read(task)
    assert record.answer is not None and record.answer.fence == f"f{ended.index(True)}"
    assert store.answer(task, record.answer.fence) == str(ended.index(True)).encode()


def test_a_cancelled_task_stays_so_whatever_its_run_says(store: TaskStore) -> None:
    task = take(store)
    store.begin(task, "f1")
    assert store.cancel(task).state is TaskState.CANCELLED
    assert not store.finish(task, "f1", answer("f1"), b"late")
    assert store.begin(task, "f2") is None
    assert opened(store) == set()
    assert store.cancel(task).state is TaskState.CANCELLED, "again is no error"
    done = take(store)
    store.begin(done, "f1")
    store.finish(done, "f1", answer("f1"), b"x")
    assert store.cancel(done).state is TaskState.DONE, "what has ended stays"


def test_tries_are_counted_but_not_those_that_found_no_room(store: TaskStore) -> None:
    task = take(store)
    for fence, failed in (("a", True), ("b", False), ("c", False), ("d", True)):
        store.begin(task, fence)
        assert store.again(task, fence, "no", "busy", failed=failed)
    record = store.read(task)
    assert (record.state, record.attempts, record.failures) == (TaskState.QUEUED, 4, 2)


def test_a_dead_one_is_replayed_with_all_its_tries_and_others_are_not(store: TaskStore) -> None:
    task = take(store)
    with pytest.raises(InvalidInput, match="is queued"):
        store.replay(task)
    store.begin(task, "f1")
    store.refuse(task, "f1", TaskState.DEAD, "it failed", "dead")
    assert opened(store) == set()
    again = store.replay(task)
    assert (again.state, again.attempts, again.failures) == (TaskState.QUEUED, 0, 0)
    assert opened(store) == {task}


def test_a_page_is_newest_first_and_of_one_tenant(store: TaskStore) -> None:
    mine = [take(store) for _ in range(5)]
    take(store, TenantId("globex"))
    newest = sorted((task.ulid for task in mine), reverse=True)
    assert page(store, 2) == (newest[:2], newest[1])
    assert page(store, 10, newest[1]) == (newest[2:], None)
    assert page(store, 5) == (newest, None)
    store.cancel(mine[0])
    assert page(store, 10, state=TaskState.CANCELLED) == ([mine[0].ulid], None)


def test_a_page_reads_a_bounded_number_and_says_where_to_go_on(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatshare.tasks.store.MOST_READ", 3)
    tasks = [take(store) for _ in range(7)]
    oldest = min(tasks, key=lambda task: task.ulid)
    store.cancel(oldest)
    seen, before, pages = [], "", 0
    while before is not None:
        found, before = page(store, 10, before, TaskState.CANCELLED)
        seen += found
        pages += 1
    assert (seen, pages) == ([oldest.ulid], 3)


def test_what_crashed_between_two_writes_is_found_and_settled(
    store: TaskStore, blobs: MemoryStore, clock: ManualClock
) -> None:
    task = take(store)
    blobs.delete(layout.task_key(ACME, task.ulid, "record.json"))  # it was never told of
    ended = take(store)
    store.begin(ended, "f1")
    store.finish(ended, "f1", answer("f1"), b"x")
    blobs.put(
        layout.open_task_key(ACME, ended.ulid),
        b"{}",
        Create(),
    )
    running = take(store)
    assert list(store.open(older_than_s=10)) == []
    clock.advance(11)
    assert dict(store.open(older_than_s=10)) == dict.fromkeys((task, ended, running), 11)
    assert [store.settle(one, 11) for one in (task, ended)] == [None, None]
    assert store.settle(running, 11) == (store.read(running), 11)
    assert opened(store) == {task, running}, "somebody may be writing its record at this moment"
    assert store.settle(task, NEVER_TOLD_S + 1) is None
    assert not list(blobs.list(layout.task_prefix(ACME, task.ulid))), "its input goes, too"
    assert opened(store) == {running}


def test_what_has_ended_goes_after_its_time_with_all_it_holds(
    store: TaskStore, blobs: MemoryStore, clock: ManualClock
) -> None:
    ended, waiting = take(store), take(store)
    store.begin(ended, "f1")
    store.finish(ended, "f1", answer("f1"), b"x")
    assert store.remove_expired() == 0
    clock.advance(90)
    dead = take(store)
    store.begin(dead, "f")
    store.refuse(dead, "f", TaskState.DEAD, "x", "x")
    clock.advance(11)
    assert store.remove_expired() == 1
    assert store.read(dead).state is TaskState.DEAD, "kept from its end on"
    assert not list(blobs.list(layout.task_prefix(ACME, ended.ulid)))
    assert store.read(waiting).state is TaskState.QUEUED
    with pytest.raises(NotFound):
        store.read(ended)


def test_ids_and_records_that_are_none_are_refused(store: TaskStore) -> None:
    for text in (
        "",
        "acme",
        "acme.x",
        "acme." + "I" * 26,
        ".01JD8ZQ6E4W7YB1R2N9K3M5T0V",
        "a/b.01JD8ZQ6E4W7YB1R2N9K3M5T0V",
    ):
        with pytest.raises(InvalidInput):
            TaskId.parse(text)
    with pytest.raises(Corrupt):
        TaskRecord.decode(b"{}", "k")
    with pytest.raises(NotFound):
        store.read(TaskId.new(ACME))


def test_a_replay_at_the_moment_of_its_end_stays_open(store: TaskStore, blobs: MemoryStore) -> None:
    """The end deletes the note that it is open after the record changed; a replay may come between the two."""
    task = take(store)
    store.begin(task, "f")
    delete = blobs.delete

    def replayed_first(key: str) -> None:
        blobs.delete = delete  # type: ignore[method-assign]
        store.replay(task)
        delete(key)

    blobs.delete = replayed_first  # type: ignore[method-assign]
    store.refuse(task, "f", TaskState.FAILED, "x", "x")
    assert (store.read(task).state, opened(store)) == (TaskState.QUEUED, {task})


def test_records_that_nobody_can_read_stop_nothing(
    store: TaskStore, blobs: MemoryStore, clock: ManualClock
) -> None:
    bad, good = take(store), take(store)
    blobs.put(layout.task_key(ACME, bad.ulid, "record.json"), b"{", Overwrite())
    store.begin(good, "f")
    store.finish(good, "f", answer("f"), b"x")
    assert page(store, 10) == ([good.ulid], None)
    clock.advance(101)
    assert store.remove_expired() == 1


def test_no_room_is_counted_from_its_first_refusal(store: TaskStore, clock: ManualClock) -> None:
    task = take(store)
    clock.advance(5000)
    store.begin(task, "a")
    store.again(task, "a", "no", "busy", failed=False)
    first = store.read(task).busy_since
    clock.advance(10)
    store.begin(task, "b")
    store.again(task, "b", "no", "busy", failed=False)
    assert first is not None and store.read(task).busy_since == first
    store.begin(task, "c")
    store.again(task, "c", "it failed", "x", failed=True)
    assert store.read(task).busy_since is None
