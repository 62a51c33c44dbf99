"""Tasks through Redis, by Celery: Ray Serve's own adapter, for a pool on several machines.

Celery redelivers what a dead worker had in hand only minutes later. How many wait of each tenant is counted
in a set of ids beside Celery's list. Without persistence Redis forgets all of it when it ends; the store
does not.
"""

from __future__ import annotations

import base64
import functools
import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, TypeVar

import redis
from ray.serve.schema import TaskProcessorConfig
from ray.serve.task_consumer import instantiate_adapter_from_config

from flatshare.errors import Overloaded, TooManyTasks
from flatshare.placement.consumers import Backlog
from flatshare.pool.celery_queue import BROKER_S, QUEUE, CeleryTasks, OpenTasks, full_url, queue_config
from flatshare.tasks.records import TaskId
from flatshare_registry.errors import RegistryError, Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.records import ulid_time_ms

__all__ = ["RedisQueue", "RedisTaskAdapter"]

T = TypeVar("T")

UNACKED: Final = "unacked"
"""Kombu's hash of messages that workers have in hand, those that they hold back among them."""

MOST_READ: Final = 1000
"""Messages in workers' hands that are looked into, each second, for whether they are only held back."""

VISIBILITY_S: Final = 120
"""Seconds after which Redis gives back what a dead worker had in hand; kombu looks every hundred or so."""


def _waiting(tenant: str) -> str:
    """The set of a tenant's tasks that have not ended."""
    return f"flatshare:waiting:{tenant}"


class RedisQueue:
    """The queue, as the routes see it. Methods block.

    Parameters
    ----------
    most, most_of_tenant
        Tasks that may wait, in all and of one tenant.
    open_of
        How many of a tenant's tasks, or of all, have not ended.
    """

    def __init__(
        self, url: str, password_file: str, run_s: float, most: int, most_of_tenant: int,
        open_of: Callable[[TenantId | None], int],
    ) -> None:  # fmt: skip
        self._open = OpenTasks(open_of)
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
                self._adapter = instantiate_adapter_from_config(queue_config(RedisTaskAdapter, *self._where))
            self._redis.sadd(_waiting(task.tenant), str(task))
            self._adapter.put(task)
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

    def missing_of(self, tasks: int) -> int:
        """How many of so many open tasks do not wait: a worker has them in hand, or they are lost."""
        return max(tasks - self._asked(lambda: int(self._redis.llen(QUEUE))), 0)

    def backlog(self) -> Backlog:
        """How much it holds. Raises ``Unavailable``."""

        def look() -> Backlog:
            waiting, in_hand = int(self._redis.llen(QUEUE)), int(self._redis.hlen(UNACKED))
            oldest = self._redis.lindex(QUEUE, -1) if waiting else None
            held = sum(map(_is_held, self._redis.hvals(UNACKED))) if in_hand <= MOST_READ else 0
            # What a killed worker had in hand stays there for minutes, while its tasks have ended long ago.
            under_way = min(in_hand - held, max(self._open.all() - waiting, 0))
            return Backlog(waiting, under_way, _age_s(oldest), held)

        return self._asked(look)

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except redis.RedisError as error:
            raise Unavailable(f"the queue of tasks does not answer: {type(error).__name__}") from error


def _is_held(value: Any) -> bool:
    """Whether a message in a worker's hand is only held back until its time."""
    try:
        eta = json.loads(value)[0]["headers"]["eta"]
        return eta is not None and datetime.fromisoformat(eta).timestamp() > time.time()
    except (ValueError, KeyError, TypeError, IndexError):
        return False


def _age_s(message: Any) -> float:
    """Seconds since the task of a message was made, which its id says; 0 for a message that says nothing."""
    try:
        (task_id, *_), *_ = json.loads(base64.b64decode(json.loads(message)["body"]))
        return max(time.time() - ulid_time_ms(TaskId.parse(task_id).ulid) / 1000, 0.0)
    except (ValueError, KeyError, TypeError, RegistryError):
        return 0.0


class RedisTaskAdapter(CeleryTasks):
    """Celery on Redis."""

    def __init__(self, config: TaskProcessorConfig) -> None:
        super().__init__(config)
        self._redis = redis.Redis.from_url(self.url, socket_timeout=BROKER_S, socket_connect_timeout=BROKER_S)

    def transport_options(self, run_s: float) -> dict[str, Any]:
        """See :class:`CeleryTasks`."""
        return {
            "visibility_timeout": max(VISIBILITY_S, 2 * run_s),
            "socket_timeout": BROKER_S,
            "socket_connect_timeout": BROKER_S,
        }

    def ended(self, task_id: str) -> None:
        """A task waits no more."""
        self._redis.srem(_waiting(TaskId.parse(task_id).tenant), task_id)

    def check(self) -> None:
        """Return if Redis answers; raises ``Unavailable``."""
        try:
            self._redis.ping()
        except redis.RedisError as error:
            raise Unavailable(f"Redis does not answer: {type(error).__name__}") from error
