"""The queue of tasks and who runs them, over HTTP."""

from __future__ import annotations

from pydantic import BaseModel, Field

from flatshare.tasks.keeper import Tended

__all__ = ["TaskQueueReply"]


class TaskQueueReply(BaseModel):
    """How much waits, and how many consumers run it. Tasks themselves are at ``/tasks`` of the data plane."""

    answers: bool = Field(description="Whether the queue does; else the numbers of what waits are null.")
    due: int | None = Field(description="Tasks that could be run now.")
    under_way: int | None = Field(description="Tasks that a consumer has in hand.")
    oldest_s: float | None = Field(description="Seconds for which the oldest due one has waited.")
    consumers: int | None = Field(description="Processes that run them; null until it is known.")
    min_consumers: int
    max_consumers: int

    @classmethod
    def of(cls, tended: Tended) -> TaskQueueReply:
        """From what was seen and decided last."""
        backlog, bounds = tended.backlog, tended.bounds
        return cls(
            answers=backlog is not None,
            due=backlog.due if backlog else None,
            under_way=backlog.under_way if backlog else None,
            oldest_s=backlog.oldest_s if backlog and backlog.tells_age else None,
            consumers=tended.consumers,
            min_consumers=bounds.minimum,
            max_consumers=bounds.maximum,
        )
