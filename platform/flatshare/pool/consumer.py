"""The consumer of tasks: a Serve deployment that runs what waits, by asking the pool."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol, cast

from ray import serve
from ray.serve.schema import TaskProcessorConfig
from ray.serve.task_consumer import task_consumer, task_handler

from flatshare.api.tasks import Tasks
from flatshare.callback_rules import CallbackRules
from flatshare.pool.embedded_queue import EmbeddedQueue, SqliteTaskAdapter
from flatshare.pool.handle import control_handle, pool_handle
from flatshare.pool.task_names import RUN
from flatshare.settings import Settings
from flatshare.tasks.callbacks import CallbackSender
from flatshare.tasks.records import TaskId, TaskState
from flatshare.tasks.runner import Asked, Reply, TaskRunner, longest_back_off
from flatshare.tasks.store import TaskStore
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import RegistryError

__all__ = ["TASKS_APP", "consumer_application", "tasks_of"]

logger = logging.getLogger("flatshare.tasks")

TASKS_APP: Final = "flatshare-tasks"
CONSUMER_DEPLOYMENT: Final = "TaskConsumer"

SWEEP_S: Final = 15.0
"""Seconds between two looks for open tasks that the queue does not know, and for those past their time."""

LOST_AFTER_S: Final = 20.0
"""Seconds after which a task that waits must be in the queue, beside those for which it is held back."""

REMOVE_S: Final = 600.0
"""Seconds between two looks for tasks past their time: each lists all of them."""

RUN_MARGIN_S: Final = 15.0
"""Beyond a request's time: a run that has not ended by then has died, where no lease says so."""


class Adapter(Protocol):
    """What the consumer asks of its adapter beside Ray Serve's own methods."""

    failed: str | None
    """Why it does not work any more; None while it does."""

    def lacks_some_of(self, tasks: int) -> bool:
        """Whether so many open tasks are more than the queue knows of."""
        ...

    def check(self) -> None:
        """Return if the queue answers; raises ``Unavailable``. Blocks."""
        ...

    def enqueue_task_sync(self, task_name: str, args: Any = None) -> Any:
        """Have a task run."""
        ...


def tasks_of(settings: Settings) -> Tasks | None:
    """Where a replica of the pool takes tasks; None: nowhere."""
    if settings.tasks == "off":
        return None
    store = TaskStore(settings.open_store(), settings.tasks_keep_s)
    limits = (settings.tasks_queued, settings.tasks_queued_per_tenant)
    callbacks = CallbackRules.parse(settings.tasks_callback_hosts)
    if settings.tasks == "embedded":
        return Tasks(store, EmbeddedQueue(Path(settings.tasks_file), *limits), callbacks)
    from flatshare.pool.redis_queue import RedisQueue

    where = (settings.tasks_redis_url, settings.tasks_redis_password_file, _run_s(settings))
    return Tasks(store, RedisQueue(*where, *limits), callbacks)


def _run_s(settings: Settings) -> float:
    """Seconds after which a run has ended, or died."""
    return settings.request_timeout_s + RUN_MARGIN_S


def _config(settings: Settings) -> TaskProcessorConfig:
    if settings.tasks == "embedded":
        return TaskProcessorConfig(
            queue_name="flatshare", adapter=SqliteTaskAdapter, adapter_config={"path": settings.tasks_file}
        )
    from flatshare.pool.redis_queue import redis_config

    return redis_config(settings.tasks_redis_url, settings.tasks_redis_password_file, _run_s(settings))


class TaskConsumer:
    """Runs tasks, as Serve starts it.

    Parameters
    ----------
    settings
        All settings, already validated.
    """

    _adapter: Adapter

    def __init__(self, settings: Settings) -> None:
        store = settings.open_store()
        self._store = TaskStore(store, settings.tasks_keep_s)
        # The embedded queue's leases say that a run has died; where there are none, its time does.
        self._run_s = _run_s(settings)
        alone_s = 0.0 if settings.tasks == "embedded" else self._run_s
        callbacks = CallbackSender(CallbackRules.parse(settings.tasks_callback_hosts))
        self._runner = TaskRunner(self._store, Registry(store).head, self._ask, callbacks, alone_s=alone_s)
        self._wakes = settings.least_replicas == 0
        self._put_at: dict[TaskId, float] = {}
        self._checking = ThreadPoolExecutor(1, thread_name_prefix="check the queue")
        self._sweeping: asyncio.Task[None] | None = None

    @task_handler(name=RUN)
    async def run(self, task_id: str) -> float | None:
        """See :meth:`TaskRunner.run`."""
        return await self._runner.run(TaskId.parse(task_id))

    async def check_health(self) -> None:
        """Called by Serve, which looks at neither workers nor queue itself."""
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep(), name="look for lost tasks")
        # In a thread of its own: a slow store has all of the loop's, and must not look like a dead queue.
        await asyncio.get_running_loop().run_in_executor(self._checking, self._adapter.check)
        failed = self._adapter.failed
        if failed is not None or self._sweeping.done():
            raise RuntimeError(f"tasks are not run any more: {failed or 'nobody looks for lost ones'}")

    async def _sweep(self) -> None:
        """Put open tasks into the queue that it lost; remove those past their time."""
        removed_at = 0.0
        while True:
            try:
                await asyncio.to_thread(self._sweep_once)
                if time.monotonic() - removed_at > REMOVE_S:
                    removed_at = time.monotonic()
                    await asyncio.to_thread(self._store.remove_expired)
            except Exception as error:  # the store, or the disk; it is tried again
                logger.warning("nobody looked for lost tasks: %s", error)
            await asyncio.sleep(SWEEP_S)

    def _sweep_once(self) -> None:
        now = time.monotonic()
        self._put_at = {task: at for task, at in self._put_at.items() if now - at < self._run_s}
        tasks = list(self._store.open(LOST_AFTER_S))
        lacks_some = self._adapter.lacks_some_of(len(tasks))
        for task, age_s in tasks:
            try:
                found = self._store.settle(task, age_s)
            except RegistryError as error:  # of this one
                logger.warning("task %s: %s", task, error.message)
                continue
            if found is None or not lacks_some or task in self._put_at:
                continue
            record, unchanged_s = found
            held_s = longest_back_off(record.tries) + LOST_AFTER_S
            if unchanged_s > (self._run_s if record.state is TaskState.RUNNING else held_s):
                self._adapter.enqueue_task_sync(RUN, [str(task)])
                self._put_at[task] = now

    async def _ask(self, asked: Asked) -> Reply:
        handle = pool_handle().options(multiplexed_model_id=asked.ref)
        try:
            async with asyncio.timeout(self._run_s):
                reply: Reply = await handle.answer.remote(asked)
                return reply
        except TimeoutError:
            # A pool without a replica is woken by who sees requests wait, and sees none of these.
            if self._wakes:
                await control_handle().wake.remote(1)
            raise


def consumer_application(settings: Settings, environment: dict[str, str]) -> serve.Application:
    """The consumer as a Serve application, without a route: nobody reaches it but by the queue."""
    consumer = task_consumer(task_processor_config=_config(settings))(TaskConsumer)
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
