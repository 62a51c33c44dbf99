"""Keeps tasks going: requeues what the queue lost, removes old tasks, and decides the number of consumers.

There is one keeper, in the control plane, so that it also looks while no consumer runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from flatshare.placement.consumers import Backlog, consumer_wish
from flatshare.placement.scaling import Bounds, Wish, decide_replicas
from flatshare.tasks.queues import TaskQueue
from flatshare.tasks.records import TaskId, TaskState
from flatshare.tasks.runner import longest_back_off
from flatshare.tasks.store import TaskStore
from flatshare_registry.errors import RegistryError, Unavailable

__all__ = ["ScalesConsumers", "TaskKeeper", "Tended"]

logger = logging.getLogger("flatshare.tasks")

TICK_S: Final = 1.0

SWEEP_S: Final = 15.0
"""Seconds between two looks for open tasks that the queue does not know."""

LOST_AFTER_S: Final = 20.0
"""Seconds, beyond those for which it is held back, after which a waiting task must be in the queue."""

REMOVE_S: Final = 600.0
"""Seconds between two looks for tasks past their time: each lists all of them."""


NOBODY_KNOWS: Final = 1 << 30
"""Taken as the number of open tasks when the last look saw none: some may have come since."""


class ScalesConsumers(Protocol):
    """The number of consumers; calls block, and raise ``Unavailable``."""

    def wanted(self) -> int:
        """How many there should be."""
        ...

    def scale(self, replicas: int) -> None:
        """Have this many consumers."""
        ...


@dataclass(frozen=True, slots=True)
class Tended:
    """What the keeper saw and decided last.

    Attributes
    ----------
    backlog
        None: the queue does not answer.
    consumers
        How many there should be; None: nobody has said yet.
    """

    backlog: Backlog | None
    consumers: int | None
    bounds: Bounds


@dataclass(slots=True, eq=False)
class TaskKeeper:  # numpydoc ignore=PR02
    """Tends one queue. Its methods must be called on one event loop.

    Parameters
    ----------
    bounds
        Between which numbers of consumers it decides, and its delays.
    at_a_time
        Tasks that one consumer runs at a time.
    run_s
        Seconds after which a run that has not ended has died.
    """

    store: TaskStore
    queue: TaskQueue
    scaler: ScalesConsumers
    bounds: Bounds
    at_a_time: int
    run_s: float
    clock: Callable[[], float] = time.monotonic
    _tended: Tended | None = None
    _wishes: tuple[Wish, ...] = ()
    _busy_at: float = 0.0
    _swept_at: float = 0.0
    _removed_at: float = 0.0
    _open: int = NOBODY_KNOWS
    _put_at: dict[TaskId, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._busy_at = self.clock()  # a consumer that was just started is going to be needed
        self._swept_at = self._removed_at = -REMOVE_S

    @property
    def tended(self) -> Tended:
        """What was seen and decided last."""
        return self._tended or Tended(None, None, self.bounds)

    async def run(self) -> None:
        """Tend until cancelled. What fails is logged and tried again."""
        while True:
            for what in (self.tick, self._sweep, self._remove):
                try:
                    await what()
                except Exception as error:  # the store, the queue, Serve, the disk
                    logger.warning("tasks were not tended: %s", error)
            await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        """Decide once how many consumers there should be, and have them.

        Raises
        ------
        Unavailable
            The queue or Serve does not answer; the consumers stay as they are.
        """
        now = self.clock()
        try:
            backlog = await asyncio.to_thread(self.queue.backlog)
        except Unavailable:
            self._tended = Tended(None, self.tended.consumers, self.bounds)
            raise
        # A note whose task was never written stays for minutes, and is no work for anybody.
        backlog = dataclasses.replace(backlog, under_way=min(backlog.under_way, self._open))
        if not backlog.quiet:
            self._busy_at = now
        wish = consumer_wish(now, backlog, self.at_a_time, self.bounds, now - self._busy_at)
        self._wishes = (*self._wishes, wish)
        current = await asyncio.to_thread(self.scaler.wanted)
        self._tended = Tended(backlog, current, self.bounds)
        consumers, self._wishes = decide_replicas(now, current, self._wishes, self.bounds)
        # A consumer that stops would cut off its tasks. Tasks are short, so a moment without any will come.
        if consumers == current or (consumers < current and backlog.under_way):
            return
        logger.warning(
            "%d consumers of tasks become %d: %d are due, the oldest for %.0f s, %d under way",
            current, consumers, backlog.due, backlog.oldest_s, backlog.under_way,
        )  # fmt: skip
        await asyncio.to_thread(self.scaler.scale, consumers)
        self._tended = Tended(backlog, consumers, self.bounds)
        self._wishes = ()

    async def _sweep(self) -> None:
        if self.clock() - self._swept_at >= SWEEP_S:
            await asyncio.to_thread(self.sweep)
            self._swept_at = self.clock()

    async def _remove(self) -> None:
        if self.clock() - self._removed_at >= REMOVE_S:
            self._removed_at = self.clock()
            await asyncio.to_thread(self.store.remove_expired)

    def sweep(self) -> None:
        """Put open tasks that the queue lost into it again. Blocks."""
        now = self.clock()
        self._put_at = {task: at for task, at in self._put_at.items() if now - at < self.run_s}
        tasks = list(self.store.open())
        missing, is_open = self.queue.missing_of(len(tasks)) if tasks else 0, 0
        for task, age_s in tasks:
            if age_s < LOST_AFTER_S:
                is_open += 1
                continue
            try:
                found = self.store.settle(task, age_s)
            except RegistryError as error:  # of this one
                logger.warning("task %s: %s", task, error.message)
                is_open += 1
                continue
            is_open += found is not None
            if found is None or missing <= 0 or task in self._put_at:
                continue
            record, unchanged_s = found
            held_s = longest_back_off(record.tries) + LOST_AFTER_S
            if unchanged_s > (self.run_s if record.state is TaskState.RUNNING else held_s):
                self.queue.put(task)
                self._put_at[task] = now
                missing -= 1
        self._open = is_open if tasks else NOBODY_KNOWS
