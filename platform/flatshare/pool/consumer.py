"""The consumer of tasks: a Serve deployment that runs what waits, by asking the pool.

``serve.task_consumer`` starts an adapter in each replica and gives it the handler. Ours claims from the
embedded queue (``tasks/queue.py``) on the replica's event loop, so handlers are coroutines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, cast

from ray import serve
from ray.serve.schema import TaskProcessorAdapter, TaskProcessorConfig, TaskResult
from ray.serve.task_consumer import task_consumer, task_handler

from flatshare.errors import Overloaded, TooManyTasks
from flatshare.pool.handle import pool_handle
from flatshare.settings import Settings
from flatshare.tasks.queue import LEASE_S, SqliteQueue
from flatshare.tasks.records import TaskId
from flatshare.tasks.runner import Asked, Reply, TaskRunner
from flatshare.tasks.store import TaskStore
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import RegistryError, Unavailable
from flatshare_registry.ids import TenantId

__all__ = ["TASKS_APP", "EmbeddedQueue", "SqliteTaskAdapter", "consumer_application"]

logger = logging.getLogger("flatshare.tasks")

TASKS_APP: Final = "flatshare-tasks"
CONSUMER_DEPLOYMENT: Final = "TaskConsumer"
RUN: Final = "run"

IDLE_S: Final = 0.1
"""Seconds between two looks at a queue in which nothing is due."""

SWEEP_S: Final = 15.0
"""Seconds between two looks for open tasks that the queue does not know, and for those past their time."""

LOST_AFTER_S: Final = 30.0
"""Age of an open task that the queue must know by now."""


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

    def initialize(self, consumer_concurrency: int = 1) -> None:
        """Open the queue."""
        self._queue = SqliteQueue(self._path)
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

    @property
    def failed(self) -> str | None:
        """Why a worker has ended; None while all of them work."""
        for worker in self._workers:
            if worker.done():
                error = None if worker.cancelled() else worker.exception()
                return type(error).__name__ if error is not None else "it was stopped"
        return None

    async def _work(self) -> None:
        while True:
            try:
                task = await asyncio.to_thread(self._queue.claim)
                if task is None:
                    await asyncio.sleep(IDLE_S)
                    continue
                await self._run(task)
            except Unavailable as error:
                logger.error("%s", error.message)
                await asyncio.sleep(1.0)

    async def _run(self, task: TaskId) -> None:
        renewing = asyncio.create_task(self._renew(task))
        try:
            delay_s = await self._handlers[RUN](str(task))
        except RegistryError as error:  # the store does not answer: it stays as it is
            logger.warning("task %s: %s", task, error.message)
            delay_s = 1.0
        finally:
            renewing.cancel()
        if delay_s is None:
            await asyncio.to_thread(self._queue.done, task)
        else:
            await asyncio.to_thread(self._queue.back, task, delay_s)

    async def _renew(self, task: TaskId) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            with contextlib.suppress(Unavailable):
                await asyncio.to_thread(self._queue.renew, task)

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
        """Forget a task."""
        self._queue.done(TaskId.parse(task_id))

    def get_metrics_sync(self) -> dict[str, Any]:
        """How much waits."""
        length = self._queue.length()
        return {"queued": length.tasks, "oldest_s": length.oldest_s}

    def health_check_sync(self) -> list[dict[str, Any]]:
        """Whether workers work."""
        return [{"failed": self.failed}]


class TaskConsumer:
    """Runs tasks, as Serve starts it.

    Parameters
    ----------
    settings
        All settings, already validated.
    """

    _adapter: SqliteTaskAdapter

    def __init__(self, settings: Settings) -> None:
        store = settings.open_store()
        self._store = TaskStore(store, settings.tasks_keep_s)
        self._runner = TaskRunner(self._store, Registry(store).head, _ask)
        self._sweeping: asyncio.Task[None] | None = None

    @task_handler(name=RUN)
    async def run(self, task_id: str) -> float | None:
        """See :meth:`TaskRunner.run`."""
        return await self._runner.run(TaskId.parse(task_id))

    async def check_health(self) -> None:
        """Called by Serve, which looks at neither workers nor queue itself."""
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep(), name="look for lost tasks")
        failed = self._adapter.failed
        if failed is not None or self._sweeping.done():
            raise RuntimeError(f"tasks are not run any more: {failed or 'nobody looks for lost ones'}")

    async def _sweep(self) -> None:
        """Put open tasks into the queue that it lost; remove those past their time."""
        while True:
            try:
                await asyncio.to_thread(self._sweep_once)
            except Exception as error:  # the store, or the disk; it is tried again
                logger.warning("nobody looked for lost tasks: %s", error)
            await asyncio.sleep(SWEEP_S)

    def _sweep_once(self) -> None:
        for task in self._store.open(LOST_AFTER_S):
            if self._store.settle(task):
                self._adapter.enqueue_task_sync(RUN, [str(task)])
        self._store.remove_expired()


async def _ask(asked: Asked) -> Reply:
    handle = pool_handle().options(multiplexed_model_id=asked.ref)
    reply: Reply = await handle.answer.remote(asked)
    return reply


def consumer_application(settings: Settings, environment: dict[str, str]) -> serve.Application:
    """The consumer as a Serve application, without a route: nobody reaches it but by the queue."""
    config = TaskProcessorConfig(
        queue_name="flatshare", adapter=SqliteTaskAdapter, adapter_config={"path": settings.tasks_file}
    )
    consumer = task_consumer(task_processor_config=config)(TaskConsumer)
    # serve.deployment is typed for use as a decorator only.
    deployment = cast("Any", serve.deployment)(
        consumer,
        name=CONSUMER_DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": {"env_vars": {**environment, "CUDA_VISIBLE_DEVICES": ""}},
        },
        # As many tasks at a time: fewer than a replica's places, so that requests of the moment find room.
        max_ongoing_requests=settings.tasks_at_a_time,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5,
    )
    application: serve.Application = deployment.bind(settings)
    return application
