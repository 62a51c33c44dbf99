"""Swapping a promoted version in: the old one answers until the new one is resident (promise 10).

When an alias moves and the version that it meant is resident here, requests for the alias go on
running on that version, which their replies name, while the new one is loaded beside it. Then the
next request runs on the new one: nobody fails or waits. The old one stays until it is evicted like
any other, so rolling back finds it.

A new version that can't be loaded doesn't take the old one down: the alias stays where it was on this
replica, the snapshot says why, and the load is tried again every ``RETRY_S`` while requests come.
(ModelMesh's VModels do the same: github.com/kserve/modelmesh, VModel transitions.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from flatshare.residency.model_cache import ModelCache
from flatshare.weights.tiers import ModelKey, SwapInfo
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import TenantHead, VersionRecord

__all__ = ["Swaps"]

logger = logging.getLogger("flatshare.resolution")

RETRY_S: Final = 5.0
"""Seconds after which a new version that failed to load is tried again."""


@dataclass(slots=True, eq=False)
class _Swap:
    old: VersionRecord
    number: int
    task: asyncio.Task[None] | None = None
    error: str = ""
    retry_at: float = 0.0
    meant: frozenset[int] = frozenset()


class Swaps:
    """The swaps of one replica; must be used on one event loop.

    Parameters
    ----------
    cache
        Where the versions are resident.
    record_of
        Reads a version's record.
    timeout_s
        Seconds that one try of a load may take.
    on_change
        Called when what an alias means here has changed; must not raise.
    """

    def __init__(
        self,
        cache: ModelCache,
        record_of: Callable[[TenantId, int], Awaitable[VersionRecord]],
        *,
        timeout_s: float,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._record_of = record_of
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._clock = clock
        self._swaps: dict[tuple[str, str], _Swap] = {}

    def moved(self, old: TenantHead | None, new: TenantHead | None) -> None:
        """A tenant's head was read anew: begin, redirect or end the swaps of its aliases."""
        tenant = new.tenant if new is not None else old.tenant if old is not None else ""
        for key in [key for key in self._swaps if key[0] == tenant]:
            swap = self._swaps[key]
            number = new.aliases.get(key[1]) if new is not None else None
            if new is None or number is None or swap.old.version not in new.versions:
                self._end(key)  # the alias or the old version is gone: nothing to hold on to
            elif number == swap.old.version:
                self._end(key)  # rolled back before it was done
            elif number != swap.number:
                self._end(key)
                self._begin(key, swap.old, number, new)
        if old is None or new is None:
            return
        for alias, number in new.aliases.items():
            before = old.aliases.get(alias)
            key = (tenant, alias)
            if before is None or before == number or key in self._swaps or before not in new.versions:
                continue
            record = self._cache.record_of(ModelKey(tenant, before))
            if record is not None and not self._cache.is_resident(ModelKey(tenant, number)):
                self._begin(key, record, number, new)

    def serving(self, ref: ModelRef) -> VersionRecord | None:
        """The old version that still answers for an alias; None when the ref means what the head says."""
        if not self._swaps or isinstance(ref.selector, int):
            return None
        key = (str(ref.tenant), str(ref.selector))
        swap = self._swaps.get(key)
        if swap is None:
            return None
        if not self._cache.is_resident(ModelKey.of(swap.old)):
            self._end(key)  # evicted or unloaded: its requests wait for the new one, like any cold one
            return None
        if swap.task is None and self._clock() >= swap.retry_at:
            swap.task = asyncio.create_task(self._run(key, swap), name=f"swap {key}")
        return swap.old

    async def settled(self, tenant: str, timeout_s: float) -> None:
        """Wait until a tenant's swaps that are under way have ended, well or badly, or the time is over."""
        tasks = [swap.task for key, swap in self._swaps.items() if key[0] == tenant and swap.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    def snapshot(self) -> list[SwapInfo]:
        """Aliases that are not yet where they were moved to."""
        return [
            SwapInfo(tenant, alias, swap.old.version, swap.number, swap.error)
            for (tenant, alias), swap in self._swaps.items()
        ]

    def close(self) -> None:
        """End all swaps."""
        for key in list(self._swaps):
            self._end(key)

    def _begin(self, key: tuple[str, str], old: VersionRecord, number: int, head: TenantHead) -> None:
        swap = self._swaps[key] = _Swap(old, number, meant=frozenset(head.aliases.values()))
        swap.task = asyncio.create_task(self._run(key, swap), name=f"swap {key}")

    def _end(self, key: tuple[str, str]) -> None:
        swap = self._swaps.pop(key)
        if swap.task is not None:
            swap.task.cancel()
        self._on_change()

    async def _run(self, key: tuple[str, str], swap: _Swap) -> None:
        old = ModelKey.of(swap.old)
        try:
            record = await self._record_of(TenantId(key[0]), swap.number)
            with self._cache.protected(old):
                await self._cache.preload(record, self._timeout_s)
        except Exception as error:  # whatever it is, the old version goes on answering
            swap.error = f"{type(error).__name__}: {error}"
            swap.retry_at = self._clock() + RETRY_S
            swap.task = None
            logger.warning(
                "%s:%s stays on version %d: version %d can't be loaded: %s",
                *key, swap.old.version, swap.number, swap.error,
            )  # fmt: skip
            return
        if self._swaps.get(key) is not swap:
            return
        # The one step of the swap: from here on the alias means what the head says.
        del self._swaps[key]
        self._cache.stats.swaps += 1
        self._on_change()
        if self._cache.is_pinned(old):
            await self._move_pin(swap, record)

    async def _move_pin(self, swap: _Swap, record: VersionRecord) -> None:
        """Move the pin along: a pin set through an alias is meant for whatever the alias names."""
        old = ModelKey.of(swap.old)
        try:
            await self._cache.preload(record, self._timeout_s, pin=True)
        except Exception as error:  # the old one stays pinned: better one too many than none
            logger.warning("the pin of %s stays there: %s can't be pinned: %s", old, record.name, error)
            return
        if old.version not in swap.meant:
            self._cache.unpin(old)
