"""One run of a task: begin, check the right again, ask the pool, keep the answer once, tell its sender."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final, Protocol

from opentelemetry.trace import SpanKind

from flatshare.tasks.callbacks import CallbackRefused, message_of, signed_headers
from flatshare.tasks.records import Answered, TaskId, TaskRecord, TaskState
from flatshare.tasks.store import TaskStore
from flatshare.telemetry.tracing import TRACEPARENT, joined, sent_on
from flatshare_registry.errors import InvalidInput, NotFound, RegistryError
from flatshare_registry.ids import TenantId
from flatshare_registry.records import TenantHead, TenantState, new_ulid

__all__ = ["Asked", "Reply", "SendsCallbacks", "TaskRunner", "longest_back_off"]

logger = logging.getLogger("flatshare.tasks")

MOST_FAILURES: Final = 5
"""Runs that may end without an answer, by a crash or a 500, before a task is given up: a poison task ends
here.
"""

FIRST_BACK_OFF_S: Final = 1.0
MOST_BACK_OFF_S: Final = 60.0

MOST_CALLING: Final = 8
"""Callbacks of one consumer at a time, and one of a tenant: a receiver that does not answer must not take the
places of tasks. The next one is tried a moment later."""

MOST_CALLBACKS_S: Final = 3600.0
"""Seconds after a task's end for which its callback is tried."""

MOST_REFUSALS_S: Final = 3600.0
"""Seconds for which a task is tried while the pool has no room, or the store does not answer."""

BUSY: Final = frozenset({408, 429, 503, 504})
"""Statuses that say nothing about the request: it is tried again later."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the pool is asked."""

    path: str
    ref: str
    headers: Mapping[str, str]
    body: bytes
    request_id: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What it answers."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class SendsCallbacks(Protocol):
    """Posts a message to the receiver that a task's sender named."""

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        """Post it. Raises ``CallbackRefused``."""
        ...


class TaskRunner:
    """Runs tasks, each once or more often; answers are kept once.

    Parameters
    ----------
    head
        Reads a tenant's head; blocks.
    ask
        Has the pool answer; raises whatever goes wrong on the way there.
    callbacks
        Sends the messages of tasks' ends.
    alone_s
        Seconds for which a run that was begun is assumed to be under way, and is left alone. 0 where the
        queue's leases show it.
    """

    def __init__(
        self,
        store: TaskStore,
        head: Callable[[TenantId], TenantHead],
        ask: Callable[[Asked], Awaitable[Reply]],
        callbacks: SendsCallbacks,
        clock: Callable[[], float] = time.time,
        *,
        alone_s: float = 0.0,
    ) -> None:
        self._alone_s = alone_s
        self._store = store
        self._head = head
        self._ask = ask
        self._callbacks = callbacks
        self._calling: Counter[str] = Counter()
        self._clock = clock

    async def run(self, task: TaskId) -> float | None:
        """Run a task once; if it has ended by then, send its callback if one is owed.

        Returns
        -------
        float or None
            Seconds after which this should be called again; None: there is nothing more to do.
        """
        fence = new_ulid()
        record = await asyncio.to_thread(self._store.begin, task, fence, self._alone_s)
        if record is None:
            open_now = await asyncio.to_thread(self._store.settle, task, 0.0)
            if open_now is None:
                return None
            if open_now[0].owes_callback:
                return await self._call_back(task)
            if open_now[0].state is TaskState.QUEUED:
                return FIRST_BACK_OFF_S  # it was replayed at this very moment
            return self._alone_s or None  # another run is under way: look again when it must have ended
        about: dict[str, str | int] = {"flatshare.task": str(task), "flatshare.attempt": record.attempts}
        with joined(record.traceparent or "", "task", SpanKind.CONSUMER, about):
            again_s = await self._run_once(record, task, fence)
        if again_s is None and record.callback is not None:
            return await self._call_back(task)
        return again_s

    async def _run_once(self, record: TaskRecord, task: TaskId, fence: str) -> float | None:
        if record.failures > MOST_FAILURES:
            why = record.error or "the process that ran it died each time"
            await self._give_up(task, fence, f"given up after {record.failures - 1} failures: {why}")
            return None
        try:
            refused = await asyncio.to_thread(self._refusal, record)
            if refused is not None:
                await self._refuse(task, fence, TaskState.FAILED, refused, "forbidden")
                return None
            body = await asyncio.to_thread(self._store.body, record)
            ref = record.pinned or record.input.ref
            traced = {TRACEPARENT: sent} if (sent := sent_on()) else {}
            asked = Asked(record.input.path, ref, {**record.input.headers, **traced}, body, task.ulid)
            reply = await self._ask(asked)
        except NotFound:  # its tenant has gone: so does it
            await asyncio.to_thread(self._store.forget, task)
            return None
        except InvalidInput as error:
            await self._refuse(task, fence, TaskState.FAILED, error.message, "invalid_input")
            return None
        except Exception as error:  # the way to the pool: Ray has a dozen kinds
            # A store's address is not for the sender.
            why = "the store does not answer" if isinstance(error, RegistryError) else type(error).__name__
            logger.warning("task %s: %s", task, why)
            return await self._busy(record, task, fence, f"the pool was not reached: {why}")
        return await self._take(record, task, fence, reply)

    async def _take(self, record: TaskRecord, task: TaskId, fence: str, reply: Reply) -> float | None:
        if reply.status < 300:
            version = reply.headers.get("x-flatshare-version", "")
            answer = Answered(
                status=reply.status,
                content_type=reply.headers.get("content-type", "application/json"),
                version=int(version) if version.isdigit() else None,
                digest=reply.headers.get("x-flatshare-digest"),
                fence=fence,
            )
            await asyncio.to_thread(self._store.finish, task, fence, answer, reply.body)
            return None
        error, code = _said(reply)
        if reply.status in BUSY:
            return await self._busy(record, task, fence, error)
        if reply.status < 500:
            await self._refuse(task, fence, TaskState.FAILED, error, code)
            return None
        if record.failures >= MOST_FAILURES:
            await self._give_up(task, fence, error)
            return None
        await asyncio.to_thread(self._store.again, task, fence, error, code, failed=True)
        return _back_off(record.attempts)

    async def _busy(self, record: TaskRecord, task: TaskId, fence: str, error: str) -> float | None:
        """No room now: that is no fault of the task's."""
        since = record.busy_since
        if since is not None and self._clock() - since.timestamp() > MOST_REFUSALS_S:
            await self._give_up(task, fence, error)
            return None
        await asyncio.to_thread(self._store.again, task, fence, error, "busy", failed=False)
        return _back_off(record.attempts)

    async def _call_back(self, task: TaskId) -> float | None:
        """Send a task's callback; perhaps more than once, if a process dies in between."""
        try:
            record = await asyncio.to_thread(self._store.read, task)
            if not record.owes_callback or record.callback is None:
                return None
            if self._calling[task.tenant] or self._calling.total() >= MOST_CALLING:
                return random.uniform(0.5, 1.0) * FIRST_BACK_OFF_S  # noqa: S311  # no secret
            attempts, error, over = record.callback.attempts, None, True
            since = record.callback.ended_at or record.updated_at
            self._calling[task.tenant] += 1
            try:
                secret = await asyncio.to_thread(self._secret, record)
                body = message_of(record)
                # Of this end of the task: after a replay it has another, which is another message.
                message = f"{record.id}.{since.timestamp() * 1000:.0f}"
                headers = signed_headers(secret, message, self._clock(), body)
                await self._callbacks.send(record.callback.url, headers, body)
            except NotFound:
                raise
            except Exception as refused:  # whatever it is, it counts
                known = isinstance(refused, CallbackRefused)
                if not known:
                    logger.exception("task %s: its callback was not sent", task)
                late = self._clock() - since.timestamp() > MOST_CALLBACKS_S
                error = str(refused) if known else "the callback was not sent"
                over = late or (isinstance(refused, CallbackRefused) and refused.for_good)
            finally:
                del self._calling[task.tenant]  # one of a tenant at a time, so it was the only one
        except NotFound:  # its tenant has gone: so does it
            await asyncio.to_thread(self._store.forget, task)
            return None
        if error is not None:
            logger.warning("task %s: %s", task, error)
        await asyncio.to_thread(partial(self._store.called, task, attempts, error, over=over))
        return None if over else _back_off(attempts + 1)

    def _secret(self, record: TaskRecord) -> str:
        """The digest that signs a message; raises ``CallbackRefused`` if none may be sent any more."""
        head = self._head(TenantId(record.tenant))
        refusal = self._refusal(record, head)
        if refusal is not None or record.key_id is None:
            raise CallbackRefused(refusal or "no tenant's key sent it", for_good=True)
        return head.keys[record.key_id].sha256

    async def _give_up(self, task: TaskId, fence: str, error: str) -> None:
        logger.error("task %s is dead: %s", task, error)
        await self._refuse(task, fence, TaskState.DEAD, error, "dead")

    async def _refuse(self, task: TaskId, fence: str, state: TaskState, error: str, code: str) -> None:
        await asyncio.to_thread(self._store.refuse, task, fence, state, error, code)

    def _refusal(self, record: TaskRecord, head: TenantHead | None = None) -> str | None:
        """Why the sender may not have it run any more. Raises ``NotFound`` for a tenant that is gone."""
        head = head if head is not None else self._head(TenantId(record.tenant))
        if record.owner_since is not None and head.created_at != record.owner_since:
            raise NotFound(f"tenant {record.tenant} is another one by now")
        if head.state is TenantState.SUSPENDED:
            return f"tenant {record.tenant} is suspended"
        if record.key_id is None:
            return None
        key = head.keys.get(record.key_id)
        if key is None or (key.expires_at and key.expires_at <= datetime.fromtimestamp(self._clock(), UTC)):
            return "the key that sent it is not good any more"
        return None


def _said(reply: Reply) -> tuple[str, str]:
    """Words and code of an error reply."""
    import orjson

    try:
        error = orjson.loads(reply.body)["error"]
        return str(error["message"]), str(error["code"])
    except (ValueError, KeyError, TypeError):
        return f"the pool answered {reply.status}", f"http_{reply.status}"


def longest_back_off(attempts: int) -> float:
    """Seconds that a task waits at most after so many runs; 0 after none."""
    return min(FIRST_BACK_OFF_S * 2.0 ** min(attempts - 1, 10), MOST_BACK_OFF_S) if attempts else 0.0


def _back_off(attempts: int) -> float:
    """Twice as long each time, with jitter: tasks that failed together do not come back together."""
    return longest_back_off(attempts) * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
