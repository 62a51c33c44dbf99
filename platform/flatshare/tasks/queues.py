"""What a queue of tasks must do, whichever it is. It holds ids only, and may lose them (``keeper.py``)."""

from __future__ import annotations

from typing import Protocol

from flatshare.placement.consumers import Backlog
from flatshare.tasks.records import TaskId
from flatshare_registry.ids import TenantId

__all__ = ["TaskQueue"]


class TaskQueue(Protocol):
    """A queue, as the code that takes and tends tasks sees it. Methods block, and raise ``Unavailable``."""

    def put(self, task: TaskId) -> None:
        """Have a task run."""
        ...

    def check_room(self, tenant: TenantId) -> None:
        """Return if one more may wait. Raises ``TooManyTasks`` and ``Overloaded``."""
        ...

    def missing_of(self, tasks: int) -> int:
        """How many of ``tasks`` open tasks it may not know; that many may be put again."""
        ...

    def backlog(self) -> Backlog:
        """How much it holds."""
        ...
