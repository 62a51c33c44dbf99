"""Names shared by the code that queues tasks, runs them and counts their consumers."""

from __future__ import annotations

from typing import Final

__all__ = ["CONSUMER_DEPLOYMENT", "RUN", "TASKS_APP"]

TASKS_APP: Final = "flatshare-tasks"
CONSUMER_DEPLOYMENT: Final = "TaskConsumer"

RUN: Final = "flatshare.run"
"""The handler that runs a task; its one argument is the task's id."""
