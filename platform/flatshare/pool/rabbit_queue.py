"""Tasks through RabbitMQ, by Celery: Ray Serve's own adapter, for a pool on several machines.

RabbitMQ redelivers at once what a dead worker had in hand. It does not count messages by tenant: the store,
where each open task has a note, shows how many of a tenant's wait. It does not say how many are in hand.
"""

from __future__ import annotations

from typing import Any

from amqp.exceptions import AMQPError, NotFound  # type: ignore[import-untyped]  # it has no types
from kombu.connection import Connection
from kombu.exceptions import KombuError
from kombu.pools import connections

from flatshare.placement.consumers import Backlog
from flatshare.pool.celery_queue import BROKER_S, QUEUE, CeleryQueue, CeleryTasks
from flatshare_registry.errors import Unavailable

__all__ = ["RabbitQueue", "RabbitTaskAdapter"]


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


class RabbitQueue(CeleryQueue):
    """See :class:`CeleryQueue`."""

    adapter = RabbitTaskAdapter

    def waiting(self) -> int:
        """Messages that nobody has in hand."""
        count: int = self._adapter.waiting()
        return count

    def backlog(self) -> Backlog:
        """How many tasks wait, and how many others are in hand or held back; does not say for how long.

        Raises ``Unavailable``.
        """
        due = self.waiting()
        return Backlog(due=due, under_way=max(self.open_tasks() - due, 0), tells_age=False)
