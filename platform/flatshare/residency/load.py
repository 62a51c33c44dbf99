"""One load under way, and those who wait for it; what becomes of its errors."""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import dataclass, field

from flatshare.errors import copy_of
from flatshare.residency.lease import Lease
from flatshare_registry.errors import NotFound
from flatshare_registry.records import VersionRecord

__all__ = ["Abandoned", "Load", "let_go"]


@dataclass(slots=True, eq=False)
class Load:
    """A load under way and who waits for it.

    Attributes
    ----------
    wants_room
        It is ready and waits for leases to end.
    until
        When the last of the waiters gives up, by the cache's clock.
    """

    task: asyncio.Task[None] | None = None
    waiters: list[asyncio.Future[Lease]] = field(default_factory=list)
    erased: bool = False
    wants_room: bool = False
    until: float = 0.0

    @property
    def abandoned(self) -> bool:
        """Whether all who waited have gone."""
        return all(waiter.done() for waiter in self.waiters)

    def fail(self, error: Exception) -> None:
        """Tell all who wait."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(copy_of(error))

    def check_erased(self, record: VersionRecord) -> None:
        """Stop a load whose version was erased meanwhile.

        Raises
        ------
        NotFound
            It was.
        """
        if self.erased:
            raise NotFound(f"{record.name} was erased")


class Abandoned(Exception):
    """A load that nobody waits for any more was dropped before it began."""


def let_go(error: BaseException) -> None:
    """Clear the frames of a failure: their locals hold tensors, and the error is kept for callers."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
