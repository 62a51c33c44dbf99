"""Names that a queue's messages carry: who puts a task and who runs it agree on them."""

from __future__ import annotations

from typing import Final

__all__ = ["RUN"]

RUN: Final = "flatshare.run"
"""The handler that runs a task; its one argument is the task's id."""
