"""Tasks through Redis, by Celery: Ray Serve's own adapter, for a pool on several machines.

Celery redelivers what a dead worker had in hand only minutes later. How many tasks of each tenant wait is
counted from the notes in the store. Without persistence Redis forgets all of it when it ends; the store does
not.
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

from flatshare.placement.consumers import Backlog
from flatshare.pool.celery_queue import BROKER_S, QUEUE, CeleryQueue, CeleryTasks, full_url
from flatshare.tasks.records import TaskId
from flatshare_registry.errors import RegistryError, Unavailable
from flatshare_registry.records import ulid_time_ms

__all__ = ["RedisQueue", "RedisTaskAdapter"]

T = TypeVar("T")

UNACKED: Final = "unacked"
"""Kombu's hash of messages that workers have in hand, those that they hold back among them."""

MOST_READ: Final = 1000
"""Most messages in workers' hands that are read, each second, to see whether they are only held back."""

VISIBILITY_S: Final = 120
"""Seconds after which Redis gives back what a dead worker had in hand; kombu looks every hundred or so."""


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

    def check(self) -> None:
        """Return if Redis answers; raises ``Unavailable``."""
        try:
            self._redis.ping()
        except redis.RedisError as error:
            raise Unavailable(f"Redis does not answer: {type(error).__name__}") from error


class RedisQueue(CeleryQueue):
    """See :class:`CeleryQueue`."""

    adapter = RedisTaskAdapter

    @functools.cached_property
    def _redis(self) -> redis.Redis:
        url, password_file, _ = self._where
        return redis.Redis.from_url(
            full_url(url, password_file), socket_timeout=BROKER_S, socket_connect_timeout=BROKER_S
        )

    def waiting(self) -> int:
        """Messages that nobody has in hand."""
        return self._asked(lambda: int(self._redis.llen(QUEUE)))

    def backlog(self) -> Backlog:
        """How much it holds. Raises ``Unavailable``."""

        def look() -> Backlog:
            waiting, in_hand = int(self._redis.llen(QUEUE)), int(self._redis.hlen(UNACKED))
            oldest = self._redis.lindex(QUEUE, -1) if waiting else None
            held = sum(map(_is_held, self._redis.hvals(UNACKED))) if in_hand <= MOST_READ else 0
            # What a killed worker had in hand stays there for minutes, while its tasks have ended long ago.
            under_way = min(in_hand - held, max(self.open_tasks() - waiting, 0))
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
