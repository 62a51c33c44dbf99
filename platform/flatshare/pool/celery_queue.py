"""What queues by Celery share: the address with its password, and Ray Serve's adapter with coroutines.

A message holds a task's id, nothing else. Celery may deliver one twice; a record's compare-and-swap makes
that harmless (``tasks/store.py``).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig
from ray.serve.task_consumer import instantiate_adapter_from_config
from ray.serve.task_processor import CeleryTaskProcessorAdapter

from flatshare.errors import Overloaded, TooManyTasks
from flatshare.pool.task_names import RUN
from flatshare.tasks.records import TaskId
from flatshare_registry.errors import Corrupt, RegistryError, Unavailable
from flatshare_registry.ids import TenantId

__all__ = ["BROKER_S", "QUEUE", "CeleryQueue", "CeleryTasks", "full_url", "queue_config"]

logger = logging.getLogger("flatshare.tasks")

QUEUE: Final = "flatshare"

BROKER_S: Final = 3.0
"""Seconds that a broker has to answer."""

STORE_DOWN_S: Final = 2.0

COUNT_S: Final = 5.0
"""Seconds for which a count of open tasks is used again."""


def queue_config(
    adapter: type[CeleryTasks], url: str, password_file: str, run_s: float
) -> TaskProcessorConfig:
    """Ray Serve's configuration of a queue. It holds no password, because Serve keeps and shows it.

    Parameters
    ----------
    run_s
        Seconds that a run may take: a task in hand must not be delivered again sooner.
    """
    return TaskProcessorConfig(
        queue_name=QUEUE,
        adapter=adapter,
        adapter_config={"url": url, "password_file": password_file, "run_s": run_s},
        max_retries=0,  # tries are counted in the task's record
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


class CeleryQueue(ABC):
    """A Celery queue, as the code that takes and tends tasks sees it. Methods block, and raise
    ``Unavailable``.

    The store says how many of a tenant's tasks wait, because each open task has a note there: brokers do not
    count by tenant, and may forget.

    Parameters
    ----------
    run_s
        Seconds that a run may take.
    most, most_of_tenant
        Tasks that may wait, in all and of one tenant.
    open_of
        How many of a tenant's tasks, or of all, have not ended; it lists the store.
    """

    adapter: type[CeleryTasks]

    def __init__(
        self, url: str, password_file: str, run_s: float, most: int, most_of_tenant: int,
        open_of: Callable[[TenantId | None], int],
    ) -> None:  # fmt: skip
        self._where = (url, password_file, run_s)
        self._most = most
        self._most_of_tenant = most_of_tenant
        self._open_of = open_of
        self._open, self._counted_at = 0, -COUNT_S

    @functools.cached_property
    def _adapter(self) -> Any:
        """Made at first use: a queue that is away must not keep a replica from starting."""
        return instantiate_adapter_from_config(queue_config(self.adapter, *self._where))

    @abstractmethod
    def waiting(self) -> int:
        """Messages that nobody has in hand."""

    def put(self, task: TaskId) -> None:
        """Have a task run."""
        try:
            self._adapter.enqueue_task_sync(RUN, [str(task)])
        except Exception as error:  # kombu and its libraries have a dozen kinds
            raise Unavailable(f"the queue of tasks does not answer: {type(error).__name__}") from error

    def check_room(self, tenant: TenantId) -> None:
        """Return if one more may wait. Raises ``TooManyTasks`` and ``Overloaded``, too."""
        of_tenant, waiting = self._open_of(tenant), self.waiting()
        if of_tenant >= self._most_of_tenant:
            raise TooManyTasks(f"tenant {tenant} has {of_tenant} tasks waiting, the limit")
        if waiting >= self._most:
            raise Overloaded(f"{waiting} tasks wait, the limit")

    def missing_of(self, tasks: int) -> int:
        """How many of ``tasks`` open tasks do not wait: a worker has them in hand, or they are lost."""
        return max(tasks - self.waiting(), 0)

    def open_tasks(self) -> int:
        """How many tasks of all tenants have not ended; the count is at most some seconds old."""
        if time.monotonic() - self._counted_at > COUNT_S:
            self._open, self._counted_at = self._open_of(None), time.monotonic()
        return self._open


class CeleryTasks(CeleryTaskProcessorAdapter):
    """Ray Serve's Celery adapter, with a handler that is a coroutine of the replica's event loop."""

    def __init__(self, config: TaskProcessorConfig) -> None:
        where = config.adapter_config
        self.url = full_url(where["url"], where["password_file"])
        celery = CeleryAdapterConfig(
            broker_url=self.url,
            backend_url=self.backend_url,
            broker_transport_options=self.transport_options(where["run_s"]),
            app_custom_config={
                # More in hand would hide what waits from other consumers.
                "worker_prefetch_multiplier": 1,
                "broker_connection_retry_on_startup": True,
                "worker_hijack_root_logger": False,
            },
            task_custom_config={"ignore_result": True},
        )
        super().__init__(config.model_copy(update={"adapter_config": celery}))

    @property
    def backend_url(self) -> str:
        """Where Celery would keep results, if it kept any."""
        return self.url

    def transport_options(self, run_s: float) -> dict[str, Any]:
        """What kombu is told of the broker."""
        return {}

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
            except Exception:  # of this task
                logger.exception("task %s", task_id)
                delay_s = 5 * STORE_DOWN_S
            if delay_s is not None:
                self.enqueue_task_sync(RUN, [task_id], countdown=delay_s)

        super().register_task_handle(run, name)  # type: ignore[no-untyped-call]  # Ray's

    async def drain(self, timeout_s: float) -> None:
        """Take no more, and let what is in hand end, within its time: Celery's warm shutdown, in a thread."""
        await asyncio.to_thread(self.stop_consumer, timeout_s)

    @abstractmethod
    def check(self) -> None:
        """Return if the broker answers; raises ``Unavailable``."""

    @property
    def failed(self) -> str | None:
        """Why it does not work: Celery's thread has ended."""
        if self._worker_thread is None or not self._worker_thread.is_alive():
            return "Celery's worker has ended"
        return None
