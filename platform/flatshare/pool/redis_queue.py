"""Tasks through Redis, by Celery: Ray Serve's own adapter, for a pool on several machines.

A message holds a task's id, nothing else. Celery redelivers what a dead worker had in hand only minutes
later, and may deliver twice; a record's compare-and-swap makes that harmless (``tasks/store.py``). How many
wait of each tenant is counted in a set of ids beside Celery's list. Without persistence Redis forgets all of
it when it ends; the store does not.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import redis
from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig
from ray.serve.task_consumer import instantiate_adapter_from_config
from ray.serve.task_processor import CeleryTaskProcessorAdapter

from flatshare.errors import Overloaded, TooManyTasks
from flatshare.placement.consumers import Backlog
from flatshare.pool.task_names import RUN
from flatshare.tasks.records import TaskId
from flatshare_registry.errors import Corrupt, RegistryError, Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.records import ulid_time_ms

__all__ = ["RedisQueue", "RedisTaskAdapter", "redis_config"]

logger = logging.getLogger("flatshare.tasks")

T = TypeVar("T")

QUEUE: Final = "flatshare"
UNACKED: Final = "unacked"
"""Kombu's hash of messages that workers have in hand, those that they hold back among them."""

VISIBILITY_S: Final = 120
"""Seconds after which Redis gives back what a dead worker had in hand; kombu looks every hundred or so."""

BROKER_S: Final = 3.0
"""Seconds that Redis has to answer."""

STORE_DOWN_S: Final = 2.0


def redis_config(url: str, password_file: str, run_s: float) -> TaskProcessorConfig:
    """Ray Serve's configuration of the queue. It names no password: Serve keeps it, and shows it.

    Parameters
    ----------
    run_s
        Seconds that a run may take: what is in hand must not be given out anew sooner.
    """
    return TaskProcessorConfig(
        queue_name=QUEUE,
        adapter=RedisTaskAdapter,
        adapter_config={"url": url, "password_file": password_file, "run_s": run_s},
        max_retries=0,  # tries are counted in the task's record
    )


def _celery_config(url: str, run_s: float) -> CeleryAdapterConfig:
    return CeleryAdapterConfig(
        broker_url=url,
        backend_url=url,
        broker_transport_options={
            "visibility_timeout": max(VISIBILITY_S, 2 * run_s),
            "socket_timeout": BROKER_S,
            "socket_connect_timeout": BROKER_S,
        },
        app_custom_config={
            # More in hand would hide what waits from other consumers.
            "worker_prefetch_multiplier": 1,
            "broker_connection_retry_on_startup": True,
            "worker_hijack_root_logger": False,
        },
        task_custom_config={"ignore_result": True},
    )


def full_url(url: str, password_file: str) -> str:
    """The address with its password, and with what Celery wants to be told of TLS.

    Raises
    ------
    Unavailable
        The file can't be read.
    """
    parts = urlsplit(url)
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in parts.query:
        query = "&".join(filter(None, [parts.query, "ssl_cert_reqs=required"]))
        parts = parts._replace(query=query)
    if password_file:
        try:
            password = Path(password_file).read_text().strip()
        except OSError as error:
            raise Unavailable(f"the password of the queue can't be read: {error.strerror}") from error
        place = parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=f"{parts.username or ''}:{quote(password, safe='')}@{place}")
    return urlunsplit(parts)


def _waiting(tenant: str) -> str:
    """The set of a tenant's tasks that have not ended."""
    return f"flatshare:waiting:{tenant}"


class RedisQueue:
    """The queue, as the routes see it. Methods block.

    Parameters
    ----------
    most, most_of_tenant
        Tasks that may wait, in all and of one tenant.
    """

    def __init__(self, url: str, password_file: str, run_s: float, most: int, most_of_tenant: int) -> None:
        self._where = (url, password_file, run_s)
        self._most = most
        self._most_of_tenant = most_of_tenant
        self._adapter: Any = None

    @functools.cached_property
    def _redis(self) -> redis.Redis:
        """Made at first use: a queue that is away must not keep a replica from starting."""
        url, password_file, _ = self._where
        return redis.Redis.from_url(
            full_url(url, password_file), socket_timeout=BROKER_S, socket_connect_timeout=BROKER_S
        )

    def put(self, task: TaskId) -> None:
        """Have a task run.

        Raises
        ------
        Unavailable
            Redis does not answer.
        """
        try:
            if self._adapter is None:
                self._adapter = instantiate_adapter_from_config(redis_config(*self._where))
            self._redis.sadd(_waiting(task.tenant), str(task))
            self._adapter.enqueue_task_sync(RUN, [str(task)])
        except Exception as error:  # redis and kombu have a dozen kinds
            raise Unavailable(f"the queue of tasks does not answer: {type(error).__name__}") from error

    def check_room(self, tenant: TenantId) -> None:
        """Return if one more may wait.

        Raises
        ------
        TooManyTasks, Overloaded
            The tenant has too many, or all have.
        Unavailable
            Redis does not answer.
        """
        of_tenant = self._asked(lambda: int(self._redis.scard(_waiting(tenant))))
        waiting = self._asked(lambda: int(self._redis.llen(QUEUE)))
        if of_tenant >= self._most_of_tenant:
            raise TooManyTasks(f"tenant {tenant} has {of_tenant} tasks waiting, the limit")
        if waiting >= self._most:
            raise Overloaded(f"{waiting} tasks wait, the limit")

    def lacks_some_of(self, tasks: int) -> bool:
        """Whether so many open tasks are more than wait: some of them may be lost."""
        return self._asked(lambda: int(self._redis.llen(QUEUE))) < tasks

    def backlog(self) -> Backlog:
        """How much it holds; one that is held back is under way, as Celery has it. Raises ``Unavailable``."""

        def look() -> Backlog:
            waiting = int(self._redis.llen(QUEUE))
            oldest = self._redis.lindex(QUEUE, -1) if waiting else None
            return Backlog(waiting, int(self._redis.hlen(UNACKED)), _age_s(oldest))

        return self._asked(look)

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except redis.RedisError as error:
            raise Unavailable(f"the queue of tasks does not answer: {type(error).__name__}") from error


def _age_s(message: Any) -> float:
    """Seconds since the task of a message was made, which its id says; 0 for a message that says nothing."""
    try:
        (task_id, *_), *_ = json.loads(base64.b64decode(json.loads(message)["body"]))
        return max(time.time() - ulid_time_ms(TaskId.parse(task_id).ulid) / 1000, 0.0)
    except (ValueError, KeyError, TypeError, RegistryError):
        return 0.0


class RedisTaskAdapter(CeleryTaskProcessorAdapter):
    """Ray Serve's Celery adapter, with a handler that is a coroutine of the replica's event loop."""

    def __init__(self, config: TaskProcessorConfig) -> None:
        where = config.adapter_config
        url = full_url(where["url"], where["password_file"])
        super().__init__(config.model_copy(update={"adapter_config": _celery_config(url, where["run_s"])}))
        self._redis = redis.Redis.from_url(url, socket_timeout=BROKER_S, socket_connect_timeout=BROKER_S)

    def register_task_handle(
        self, func: Callable[[str], Awaitable[float | None]], name: str | None = None
    ) -> None:
        """Called by Serve on the replica's event loop."""
        loop = asyncio.get_running_loop()

        def run(task_id: str) -> None:
            """In a thread of Celery's worker."""

            async def called() -> float | None:
                return await func(task_id)

            try:
                delay_s = asyncio.run_coroutine_threadsafe(called(), loop).result()
            except Corrupt as error:  # no waiting helps
                logger.error("task %s: %s", task_id, error.message)
                delay_s = None
            except RegistryError as error:  # the store does not answer: it stays as it is
                logger.warning("task %s: %s", task_id, error.message)
                delay_s = STORE_DOWN_S
            if delay_s is None:
                self._redis.srem(_waiting(TaskId.parse(task_id).tenant), task_id)
            else:
                self.enqueue_task_sync(RUN, [task_id], countdown=delay_s)

        super().register_task_handle(run, name)  # type: ignore[no-untyped-call]  # Ray's

    async def drain(self, timeout_s: float) -> None:
        """Take no more, and let what is in hand end, within its time: Celery's warm shutdown, in a thread."""
        await asyncio.to_thread(self.stop_consumer, timeout_s)

    def check(self) -> None:
        """Return if Redis answers; raises ``Unavailable``."""
        try:
            self._redis.ping()
        except redis.RedisError as error:
            raise Unavailable(f"Redis does not answer: {type(error).__name__}") from error

    @property
    def failed(self) -> str | None:
        """Why it does not work: Celery's thread has ended."""
        if self._worker_thread is None or not self._worker_thread.is_alive():
            return "Celery's worker has ended"
        return None
