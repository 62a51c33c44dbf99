"""The embedded queue of tasks, as the routes see it and as Ray Serve's adapter: no server is needed.

``serve.task_consumer`` starts an adapter in each replica of the consumer and gives it the handler. This one
claims from ``tasks/queue.py`` on the replica's event loop, so handlers are coroutines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from ray.serve.schema import TaskProcessorAdapter, TaskProcessorConfig, TaskResult

from flatshare.errors import Overloaded, TooManyTasks
from flatshare.placement.consumers import Backlog
from flatshare.pool.task_names import RUN
from flatshare.tasks.queue import LEASE_S, Claim, SqliteQueue
from flatshare.tasks.records import TaskId
from flatshare.threads import in_thread
from flatshare_registry.errors import Corrupt, RegistryError, Unavailable
from flatshare_registry.ids import TenantId

__all__ = ["EmbeddedQueue", "SqliteTaskAdapter"]

logger = logging.getLogger("flatshare.tasks")

T = TypeVar("T")

IDLE_S: Final = 0.1
"""Seconds between two looks at a queue in which nothing is due."""


class EmbeddedQueue:
    """The embedded queue, as the routes see it.

    Parameters
    ----------
    most, most_of_tenant
        Tasks that may wait, in all and of one tenant.
    """

    def __init__(self, path: Path, most: int, most_of_tenant: int) -> None:
        self._queue = SqliteQueue(path)
        self._most = most
        self._most_of_tenant = most_of_tenant

    def put(self, task: TaskId) -> None:
        """Have a task run."""
        self._queue.put(task)

    def check_room(self, tenant: TenantId) -> None:
        """Return if one more may wait.

        Raises
        ------
        TooManyTasks, Overloaded
            The tenant has too many, or all have.
        """
        length = self._queue.length(tenant)
        if length.of_tenant >= self._most_of_tenant:
            raise TooManyTasks(f"tenant {tenant} has {length.of_tenant} tasks waiting, the limit")
        if length.tasks >= self._most:
            raise Overloaded(f"{length.tasks} tasks wait, the limit; the oldest for {length.oldest_s:.0f} s")

    def missing_of(self, tasks: int) -> int:
        """Perhaps all of them: they may all be put again, because each task is in the queue only once."""
        return tasks

    def backlog(self) -> Backlog:
        """How much it holds."""
        return self._queue.backlog()


class SqliteTaskAdapter(TaskProcessorAdapter):
    """Ray Serve's adapter over the embedded queue; ``adapter_config`` is ``{"path": ...}``.

    Only what a consumer calls is of use: tasks are taken and looked at through ``TaskStore``.
    """

    def __init__(self, config: TaskProcessorConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's
        self._path = Path(config.adapter_config["path"])
        self._handlers: dict[str, Callable[[str], Awaitable[float | None]]] = {}
        self._workers: list[asyncio.Task[None]] = []
        self._concurrency = 1
        self._draining = False

    def initialize(self, consumer_concurrency: int = 1) -> None:
        """Called by Serve."""
        self._queue = SqliteQueue(self._path)
        # Of its own: while the store is slow, its calls take all of the loop's, and leases must be renewed.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="task queue")
        self._concurrency = consumer_concurrency

    def register_task_handle(self, func: Callable[..., Any], name: str | None = None) -> None:
        """Called by Serve with each handler."""
        self._handlers[name or func.__name__] = func

    def start_consumer(self, **kwargs: Any) -> None:
        """Begin to claim; called by Serve on the replica's event loop."""
        loop = asyncio.get_running_loop()
        self._workers = [loop.create_task(self._work(), name="run tasks") for _ in range(self._concurrency)]

    def stop_consumer(self, timeout: float = 10.0) -> None:
        """Claim no more; what is under way is claimed again when its lease has ended."""
        for worker in self._workers:
            worker.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Claim no more, and let what is in hand end, within its time."""
        self._draining = True
        if self._workers:
            await asyncio.wait(self._workers, timeout=timeout_s)
        self.stop_consumer()

    def check(self) -> None:
        """Return if it works; raises ``Unavailable``."""
        self._queue.length()

    @property
    def failed(self) -> str | None:
        """Why a worker has ended; None while all of them work."""
        for worker in self._workers:
            if worker.done():
                error = None if worker.cancelled() else worker.exception()
                return type(error).__name__ if error is not None else "it was stopped"
        return None

    async def _work(self) -> None:
        while not self._draining:
            try:
                claim = await self._in_thread(self._queue.claim)
                if claim is None:
                    await asyncio.sleep(IDLE_S)
                    continue
                await self._run(claim)
            except Unavailable as error:
                logger.error("%s", error.message)
                await asyncio.sleep(1.0)

    async def _run(self, claim: Claim) -> None:
        renewing = asyncio.create_task(self._renew(claim))
        try:
            delay_s = await self._handlers[RUN](str(claim.task))
        except Corrupt as error:  # no waiting helps
            logger.error("task %s: %s", claim.task, error.message)
            delay_s = None
        except RegistryError as error:  # the store does not answer: it stays as it is
            logger.warning("task %s: %s", claim.task, error.message)
            delay_s = 1.0
        except Exception:  # of this task; the others must not wait for a new process
            logger.exception("task %s", claim.task)
            delay_s = 10.0
        finally:
            renewing.cancel()
        if delay_s is None:
            await self._in_thread(lambda: self._queue.done(claim))
        else:
            await self._in_thread(lambda: self._queue.back(claim, delay_s))

    async def _renew(self, claim: Claim) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            with contextlib.suppress(Unavailable):
                await self._in_thread(lambda: self._queue.renew(claim))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await in_thread(self._threads, work)

    def enqueue_task_sync(
        self, task_name: str, args: Any = None, kwargs: Any = None, **options: Any
    ) -> TaskResult:
        """Have a task run."""
        self._queue.put(TaskId.parse(args[0]))
        return TaskResult(id=args[0], status="PENDING", result=None)

    def get_task_status_sync(self, task_id: str) -> TaskResult:
        """Not kept here."""
        raise NotImplementedError("a task's state is in its record: TaskStore.read")

    def cancel_task_sync(self, task_id: str) -> None:
        """Not kept here."""
        raise NotImplementedError("a task is cancelled in its record: TaskStore.cancel")

    def get_metrics_sync(self) -> dict[str, Any]:
        """How much waits."""
        length = self._queue.length()
        return {"queued": length.tasks, "oldest_s": length.oldest_s}

    def health_check_sync(self) -> list[dict[str, Any]]:
        """Whether workers work."""
        return [{"failed": self.failed}]
