"""A replica takes over settings that were changed in place: when it is told, and whenever it looks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from flatshare.pool.kept import Deployed, recall_deployed
from flatshare.settings import Settings

__all__ = ["SettingsFollower"]

logger = logging.getLogger("flatshare.pool")


class SettingsFollower:
    """Looks up changed settings. Must be used on one event loop.

    Parameters
    ----------
    take
        Applies settings of a revision.
    recall
        Reads the settings that are kept; blocks.
    """

    def __init__(
        self,
        take: Callable[[Settings, int], None],
        recall: Callable[[], Deployed | None] = recall_deployed,
    ) -> None:
        self._take = take
        self._recall = recall
        self._look: asyncio.Task[None] | None = None

    def follow(self) -> asyncio.Task[None]:
        """Look once, unless a look is under way: the cluster's store may hang, and threads are few.

        Returns
        -------
        Task
            Raises what the cluster's store does.
        """
        if self._look is None or self._look.done():
            self._look = asyncio.get_running_loop().create_task(self._once(), name="follow settings")
            self._look.add_done_callback(_noted)
        return self._look

    async def now(self) -> None:
        """Look anew, after a look that is under way. Raises what the cluster's store does."""
        if self._look is not None and not self._look.done():
            await asyncio.wait([self._look])
        await self.follow()

    async def _once(self) -> None:
        deployed = await asyncio.to_thread(self._recall)
        if deployed is not None:
            self._take(deployed.settings, deployed.revision)


def _noted(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("nobody could say whether settings were changed: %s", type(error).__name__)
