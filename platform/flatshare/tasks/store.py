"""Tasks in the registry's store: record, body and answer are objects of their own.

Every change of a record is a compare-and-swap, so only one of two runs of a task ends it. Each task that has
not ended has an empty object under ``open-tasks/``. It is written before the task is acknowledged, and goes
after the task has ended: whatever a queue loses is found there. Long, because each change of a record is one
step here: a reader who checks one sees what the others may do meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Final

from flatshare.tasks.inputs import StoredBody, TaskInputs
from flatshare.tasks.records import (
    Answered,
    Callback,
    CallbackState,
    TaskId,
    TaskInput,
    TaskRecord,
    TaskState,
)
from flatshare_registry import layout
from flatshare_registry.errors import AlreadyExists, Conflict, Corrupt, InvalidInput, NotFound
from flatshare_registry.ids import TenantId
from flatshare_registry.stores.base import BlobStore, Create, Overwrite, UpdateIf

__all__ = ["TaskStore"]

MOST_READ: Final = 500
"""Most records that are read for one page: a page of a rare state may have fewer tasks than asked for."""

NEVER_TOLD_S: Final = 600.0
"""Age of a note without a task: whoever was writing the task has ended long ago."""

TRIES: Final = 20
"""Tries of a compare-and-swap: only a few processes change one task."""


class TaskStore:
    """The tasks of one store. All methods block, and are safe to call from several threads and processes.

    Parameters
    ----------
    keep_s
        Seconds after which a task, and what it holds, may be removed.

    Attributes
    ----------
    inputs
        What lies in the store for tasks that name it.
    """

    def __init__(
        self, store: BlobStore, keep_s: float = 24 * 3600.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.inputs = TaskInputs(store)
        self._store = store
        self._keep_s = keep_s
        self._clock = clock

    def once(self, tenant: TenantId, key: str) -> TaskId:
        """The id of the task that an idempotency key makes: the same one each time, while it is kept."""
        task = TaskId.new(tenant)
        where = layout.task_once_key(tenant, hashlib.sha256(key.encode()).hexdigest())
        try:
            self._store.put(where, task.ulid.encode(), Create())
            return task
        except AlreadyExists:
            return TaskId.parse(f"{tenant}.{self._store.get(where).data.decode()}")

    def take(
        self,
        task: TaskId,
        path: str,
        ref: str,
        headers: dict[str, str],
        body: bytes | StoredBody,
        caller: str,
        key_id: str | None,
        *,
        owner_since: datetime | None = None,
        pinned: str | None = None,
        callback: str | None = None,
        traceparent: str | None = None,
    ) -> TaskRecord:
        """Keep a task. Once this returns it is not lost. A task already kept under this id stays as it is.

        Raises
        ------
        AlreadyExists
            A task of this id was kept for another request.
        Unavailable
            The store does not answer. A task that was not written completely is removed later by itself.
        """
        now = self._clock()
        record = TaskRecord(
            id=str(task), tenant=task.tenant, state=TaskState.QUEUED, caller=caller, key_id=key_id,
            owner_since=owner_since, pinned=pinned, callback=Callback(url=callback) if callback else None,
            traceparent=traceparent,
            input=TaskInput(
                path=path, ref=ref, headers=headers,
                size_bytes=body.size_bytes if isinstance(body, StoredBody) else len(body),
                sha256=None if isinstance(body, StoredBody) else hashlib.sha256(body).hexdigest(),
                stored=body.input if isinstance(body, StoredBody) else None,
            ),
            created_at=_at(now), updated_at=_at(now), expires_at=_at(now + self._keep_s),
        )  # fmt: skip
        with contextlib.suppress(NotFound):
            return self._same(self.read(task), record)
        with contextlib.suppress(AlreadyExists):
            self._store.put(layout.open_task_key(task.tenant, task.ulid), b"{}", Create())
        if isinstance(body, bytes):
            self._store.put(layout.task_key(task.tenant, task.ulid, "input"), body, Overwrite())
        try:
            self._store.put(layout.task_key(task.tenant, task.ulid, "record.json"), record.encode(), Create())
        except AlreadyExists:  # sent twice at the same moment
            return self._same(self.read(task), record)
        return record

    @staticmethod
    def _same(kept: TaskRecord, sent: TaskRecord) -> TaskRecord:
        same_callback = (kept.callback and kept.callback.url) == (sent.callback and sent.callback.url)
        if kept.input != sent.input or not same_callback:
            raise AlreadyExists(f"this idempotency key made task {kept.id} of another request")
        return kept

    def read(self, task: TaskId) -> TaskRecord:
        """A task. Raises ``NotFound``."""
        return self._read(task)[0]

    def has(self, task: TaskId) -> bool:
        """Whether there is such a task."""
        try:
            self.read(task)
        except NotFound:
            return False
        return True

    def body(self, record: TaskRecord) -> bytes:
        """The body of a task's request.

        Raises
        ------
        NotFound
            The task is not there any more.
        InvalidInput
            Its stored input was removed or changed since it was taken.
        """
        task, stored = TaskId.parse(record.id), record.input.stored
        if stored is not None:
            return self.inputs.read(task.tenant, stored)
        return self._store.get(layout.task_key(task.tenant, task.ulid, "input")).data

    def answer(self, task: TaskId, fence: str) -> bytes:
        """What a run answered. Raises ``NotFound``."""
        return self._store.get(layout.task_key(task.tenant, task.ulid, f"answer-{fence}")).data

    def list(
        self, tenant: TenantId, limit: int, before: str = "", state: TaskState | None = None
    ) -> tuple[list[TaskRecord], str | None]:
        """A page of a tenant's tasks, newest first.

        Parameters
        ----------
        before
            Only those older than this ULID.
        state
            Only those in this state.

        Returns
        -------
        tuple
            At most ``limit`` of them, and the ``before`` of the next page; None: there are no more. A page of
            a rare state may be short, or empty, and still have a next one.
        """
        found = {
            meta.key.split("/")[2]
            for meta in self._store.list(layout.tasks_prefix(tenant))
            if meta.key.endswith("/record.json")
        }
        older = sorted((ulid for ulid in found if not before or ulid < before), reverse=True)
        records: list[TaskRecord] = []
        for looked, ulid in enumerate(older[:MOST_READ], start=1):
            with contextlib.suppress(NotFound, Corrupt):  # it went meanwhile, or nobody can read it
                record = self.read(TaskId(tenant, ulid))
                if state in (None, record.state):
                    records.append(record)
            if len(records) == limit:
                return records, ulid if looked < len(older) else None
        return records, older[MOST_READ - 1] if len(older) > MOST_READ else None

    def begin(self, task: TaskId, fence: str, alone_s: float = 0.0) -> TaskRecord | None:
        """Begin a run; None when there is nothing to run any more, or another run is under way.

        Parameters
        ----------
        fence
            Names this run. A run before it that has not ended is overtaken: its answer will be dropped.
        alone_s
            A run that was begun less than this many seconds ago is not overtaken.
        """

        def change(record: TaskRecord) -> TaskRecord | None:
            age_s = self._clock() - record.updated_at.timestamp()
            if record.state.ended or (record.state is TaskState.RUNNING and age_s < alone_s):
                return None
            return record.now(
                TaskState.RUNNING, self._clock(), attempts=record.attempts + 1,
                failures=record.failures + 1, fence=fence,
            )  # fmt: skip

        try:
            return self._change(task, change)
        except NotFound:
            return None

    def finish(self, task: TaskId, fence: str, answer: Answered, body: bytes) -> bool:
        """End a task with an answer; False when this run may not, and its answer was dropped."""
        key = layout.task_key(task.tenant, task.ulid, f"answer-{fence}")
        self._store.put(key, body, Overwrite())
        if self._end(task, fence, TaskState.DONE, answer=answer, error=None, code=None):
            return True
        self._store.purge(key)
        return False

    def refuse(self, task: TaskId, fence: str, state: TaskState, error: str, code: str) -> bool:
        """End a task without an answer: ``FAILED`` or ``DEAD``. As :meth:`finish`."""
        return self._end(task, fence, state, error=error, code=code)

    def again(self, task: TaskId, fence: str, error: str, code: str, *, failed: bool) -> bool:
        """Have a task wait for another run. As :meth:`finish`.

        Parameters
        ----------
        failed
            Whether this run counts against its tries.
        """
        changes: dict[str, object] = {"error": error, "code": code}
        if failed:
            changes["busy_since"] = None
        return self._end(task, fence, TaskState.QUEUED, 0 if failed else 1, **changes)

    def cancel(self, task: TaskId) -> TaskRecord:
        """End a task that has not ended; a run under way goes on, and its answer is dropped. Raises
        ``NotFound``.
        """

        def change(record: TaskRecord) -> TaskRecord | None:
            return None if record.state.ended else self._ended(record, TaskState.CANCELLED, fence=None)

        changed = self._change(task, change)
        if changed is not None:
            self._close(task)
        return changed or self.read(task)

    def replay(self, task: TaskId) -> TaskRecord:
        """Have a task that was given up, or refused, tried anew.

        Raises
        ------
        InvalidInput
            It was answered, was cancelled, or has not ended.
        """

        def change(record: TaskRecord) -> TaskRecord:
            if record.state not in (TaskState.DEAD, TaskState.FAILED):
                raise InvalidInput(f"task {task} is {record.state}: what is dead or failed can be replayed")
            owed = Callback(url=record.callback.url) if record.callback else None
            return self._ended(
                record, TaskState.QUEUED, attempts=0, failures=0, fence=None, busy_since=None, callback=owed
            )

        with contextlib.suppress(AlreadyExists):
            self._store.put(layout.open_task_key(task.tenant, task.ulid), b"{}", Create())
        changed = self._change(task, change)
        assert changed is not None, "it raises, or changes"
        return changed

    def called(self, task: TaskId, attempts: int, error: str | None, *, over: bool) -> TaskRecord | None:
        """Note what became of a callback.

        Parameters
        ----------
        attempts
            How many messages it had before this one; if it has more by now, somebody else notes it.
        error
            None: it was delivered.
        over
            Whether no more are sent.

        Returns
        -------
        TaskRecord or None
            What it is now; None: there was nothing to note.
        """

        def change(record: TaskRecord) -> TaskRecord | None:
            told = record.callback
            if told is None or not record.owes_callback or told.attempts != attempts:
                return None
            state = CallbackState.OWED
            if over:
                state = CallbackState.DELIVERED if error is None else CallbackState.FAILED
            noted = told.model_copy(update={"attempts": attempts + 1, "error": error, "state": state})
            return record.now(record.state, self._clock(), callback=noted)

        try:
            changed = self._change(task, change)
        except NotFound:  # its tenant was erased meanwhile
            return None
        if changed is not None and not changed.open:
            self._close(task)
        return changed

    def drop(self, task: TaskId) -> None:
        """Remove a task, its body and its answer. Raises ``NotFound``."""
        self.read(task)
        self.forget(task)

    def forget(self, task: TaskId) -> None:
        """Remove whatever there is of a task: its tenant has gone."""
        self._store.purge_all(layout.task_prefix(task.tenant, task.ulid))
        self._store.purge(layout.open_task_key(task.tenant, task.ulid))

    def open(self, older_than_s: float = 0.0) -> Iterator[tuple[TaskId, float]]:
        """Tasks that have not ended, as far as is known, and the age of the note that says so, in seconds."""
        now = self._clock()
        for meta in self._store.list(layout.OPEN_TASKS):
            found = layout.open_task_of(meta.key)
            age_s = now - meta.modified_s
            if found is not None and age_s >= older_than_s:
                yield TaskId(TenantId(found[0]), found[1]), age_s

    def count_open(self, tenant: TenantId | None) -> int:
        """How many of a tenant's tasks, or of all, have not ended."""
        prefix = layout.OPEN_TASKS if tenant is None else layout.open_tasks_prefix(tenant)
        return sum(1 for _ in self._store.list(prefix))

    def settle(self, task: TaskId, age_s: float) -> tuple[TaskRecord, float] | None:
        """Forget that a task is open if it has ended and owes no callback, or was never written.

        Parameters
        ----------
        age_s
            Age in seconds of the note that it is open.

        Returns
        -------
        tuple or None
            The record, and the seconds since its last change; None when it is not open.
        """
        try:
            record = self.read(task)
        except NotFound:
            if age_s > NEVER_TOLD_S:  # else somebody may be writing it
                self.forget(task)
            return None
        if record.open:
            return record, self._clock() - record.updated_at.timestamp()
        self._close(task)
        return None

    def remove_expired(self) -> int:
        """Remove tasks that have ended and are past their time; how many went."""
        now_s, gone = self._clock(), 0
        for meta in self._store.list(layout.TASKS):
            if layout.is_task_once(meta.key) and now_s - meta.modified_s > self._keep_s:
                self._store.delete(meta.key)
            # One that was written lately is not read: a listing costs little, a read of each a lot.
            if not meta.key.endswith("/record.json") or now_s - meta.modified_s < self._keep_s:
                continue
            with contextlib.suppress(NotFound, Corrupt):
                record = TaskRecord.decode(self._store.get(meta.key).data, meta.key)
                if record.state.ended and record.expires_at < _at(now_s):
                    self.forget(TaskId.parse(record.id))
                    gone += 1
        return gone

    def _end(self, task: TaskId, fence: str, state: TaskState, spare: int = 0, **changes: object) -> bool:
        def change(record: TaskRecord) -> TaskRecord | None:
            if record.state is not TaskState.RUNNING or record.fence != fence:
                return None
            if spare and record.busy_since is None:
                changes["busy_since"] = _at(self._clock())
            new = {"failures": record.failures - spare, **changes}
            return (
                self._ended(record, state, **new) if state.ended else record.now(state, self._clock(), **new)
            )

        try:
            changed = self._change(task, change)
        except NotFound:  # its tenant was erased meanwhile
            return False
        if changed is not None and not changed.open:
            self._close(task)
        return changed is not None

    def _ended(self, record: TaskRecord, state: TaskState, **changes: object) -> TaskRecord:
        """The record in another state, and kept for ``keep_s`` seconds from now on."""
        now = self._clock()
        if record.callback is not None and state.ended:
            changes = {**changes, "callback": record.callback.model_copy(update={"ended_at": _at(now)})}
        return record.now(state, now, expires_at=_at(now + self._keep_s), **changes)

    def _close(self, task: TaskId) -> None:
        """Note that nothing is to be done for a task any more; it may be replayed at this very moment."""
        key = layout.open_task_key(task.tenant, task.ulid)
        self._store.delete(key)
        with contextlib.suppress(NotFound, AlreadyExists):
            if self.read(task).open:
                self._store.put(key, b"{}", Create())

    def _change(self, task: TaskId, change: Callable[[TaskRecord], TaskRecord | None]) -> TaskRecord | None:
        for _ in range(TRIES):
            record, etag = self._read(task)
            changed = change(record)
            if changed is None:
                return None
            try:
                key = layout.task_key(task.tenant, task.ulid, "record.json")
                self._store.put(key, changed.encode(), UpdateIf(etag))
            except Conflict:
                continue
            return changed
        raise Conflict(f"task {task} is changed all the time; try again")

    def _read(self, task: TaskId) -> tuple[TaskRecord, str]:
        key = layout.task_key(task.tenant, task.ulid, "record.json")
        try:
            found = self._store.get(key)
        except NotFound:
            raise NotFound(f"there is no task {task}") from None
        return TaskRecord.decode(found.data, key), found.meta.etag


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
