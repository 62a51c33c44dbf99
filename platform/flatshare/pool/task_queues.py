"""Which queue of tasks a platform has: made where tasks are taken, and where they are tended."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from flatshare.pool.embedded_queue import EmbeddedQueue
from flatshare.settings import Settings
from flatshare.tasks.queues import TaskQueue
from flatshare.tasks.store import TaskStore

__all__ = ["queue_of", "run_s"]

RUN_MARGIN_S: Final = 15.0
"""Seconds beyond a request's time after which a run counts as dead, where no lease shows it."""


def run_s(settings: Settings) -> float:
    """Seconds after which a run has ended, or died."""
    return settings.request_timeout_s + RUN_MARGIN_S


def queue_of(settings: Settings, tasks: TaskStore) -> TaskQueue:
    """The queue that these settings name (they must name one); it is reached at its first use.

    Parameters
    ----------
    tasks
        Knows how many tasks are open, where a broker does not say it.
    """
    limits = (settings.tasks_queued, settings.tasks_queued_per_tenant)
    if settings.tasks == "embedded":
        return EmbeddedQueue(Path(settings.tasks_file), *limits)
    where = (settings.tasks_broker_url, settings.tasks_broker_password_file, run_s(settings))
    if settings.tasks == "rabbitmq":
        from flatshare.pool.rabbit_queue import RabbitQueue

        return RabbitQueue(*where, *limits, tasks.count_open)
    from flatshare.pool.redis_queue import RedisQueue

    return RedisQueue(*where, *limits, tasks.count_open)
