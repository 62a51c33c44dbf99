"""Tasks through RabbitMQ, by Celery: Ray Serve's own adapter, for a pool on several machines.

What a dead worker had in hand RabbitMQ gives out again at once. It counts no messages by tenant: how many of
a tenant's wait is seen in the store, where each open task has a note. It does not say how many are in hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from amqp.exceptions import AMQPError, NotFound  # type: ignore[import-untyped]  # it has no types
from kombu.connection import Connection
from kombu.exceptions import KombuError
from kombu.pools import connections
from ray.serve.task_consumer import instantiate_adapter_from_config

from flatshare.errors import Overloaded, TooManyTasks
from flatshare.placement.consumers import Backlog
from flatshare.pool.celery_queue import BROKER_S, QUEUE, CeleryTasks, OpenTasks, queue_config
from flatshare.tasks.records import TaskId
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import TenantId

__all__ = ["RabbitQueue", "RabbitTaskAdapter"]


class RabbitQueue:
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
        self._where = (url, password_file, run_s)
        self._most = most
        self._most_of_tenant = most_of_tenant
        self._open = OpenTasks(open_of)

    @functools.cached_property
    def _adapter(self) -> RabbitTaskAdapter:
        """Made at first use: a queue that is away must not keep a replica from starting."""
        made = instantiate_adapter_from_config(queue_config(RabbitTaskAdapter, *self._where))
        return cast("RabbitTaskAdapter", made)

    def put(self, task: TaskId) -> None:
        """Have a task run.

        Raises
        ------
        Unavailable
            RabbitMQ does not answer.
        """
        try:
            self._adapter.put(task)
        except Exception as error:  # kombu and amqp have a dozen kinds
            raise Unavailable(f"the queue of tasks does not answer: {type(error).__name__}") from error

    def check_room(self, tenant: TenantId) -> None:
        """Return if one more may wait.

        Raises
        ------
        TooManyTasks, Overloaded
            The tenant has too many, or all have.
        Unavailable
            RabbitMQ, or the store, does not answer.
        """
        of_tenant, waiting = self._open.of(tenant), self._adapter.waiting()
        if of_tenant >= self._most_of_tenant:
            raise TooManyTasks(f"tenant {tenant} has {of_tenant} tasks waiting, the limit")
        if waiting >= self._most:
            raise Overloaded(f"{waiting} tasks wait, the limit")

    def missing_of(self, tasks: int) -> int:
        """How many of so many open tasks it may not know of: what is in hand is among them."""
        return max(tasks - self._adapter.waiting(), 0)

    def backlog(self) -> Backlog:
        """How many wait, and how many more have not ended, which are in hand or held back; not for how long.

        Raises ``Unavailable``.
        """
        due = self._adapter.waiting()
        return Backlog(due=due, under_way=max(self._open.all() - due, 0))


class RabbitTaskAdapter(CeleryTasks):
    """Celery on RabbitMQ."""

    @property
    def backend_url(self) -> str:
        """No results are kept."""
        return "rpc://"

    def transport_options(self, run_s: float) -> dict[str, Any]:
        """A message counts as sent once RabbitMQ has it."""
        return {"confirm_publish": True, "connect_timeout": BROKER_S, "read_timeout": BROKER_S}

    def waiting(self) -> int:
        """Messages that nobody has in hand; raises ``Unavailable``."""
        try:
            where = Connection(self.url, connect_timeout=BROKER_S)  # type: ignore[no-untyped-call]
            with connections[where].acquire(block=True) as connection:
                connection.ensure_connection(max_retries=1)
                with connection.channel() as channel:
                    try:
                        return int(channel.queue_declare(queue=QUEUE, passive=True).message_count)
                    except NotFound:  # nobody has sent anything yet
                        return 0
        except (KombuError, AMQPError, OSError) as error:
            raise Unavailable(f"RabbitMQ does not answer: {type(error).__name__}") from error

    def check(self) -> None:
        """Return if RabbitMQ answers; raises ``Unavailable``."""
        self.waiting()
