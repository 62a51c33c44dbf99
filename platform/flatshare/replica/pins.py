"""A replica that starts pins what its fleet has pinned: pins are the registry's, not one process's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from flatshare.errors import ServeError
from flatshare_registry.errors import RegistryError, Unavailable
from flatshare_registry.ids import ModelRef

__all__ = ["restore_pins"]

logger = logging.getLogger("flatshare.replica")

RETRY_S: Final = 5.0
"""Seconds until a store that did not answer is asked again."""


async def restore_pins(
    read: Callable[[], Awaitable[list[ModelRef]]],
    pin: Callable[[str], Awaitable[object]],
    unpin: Callable[[str], Awaitable[object]],
    *,
    retry_s: float = RETRY_S,
) -> None:
    """Pin all that is pinned, one after the other; tries again while the store is away. Raises nothing.

    Parameters
    ----------
    read
        All pinned refs as of now.
    pin, unpin
        Make a ref's version resident here and keep it; and the opposite.
    """
    done: set[ModelRef] = set()
    while True:
        try:
            pinned = await read()
            for ref in pinned:
                if ref not in done:
                    await _pin(ref, pin)
                    done.add(ref)
            # Who was unpinned meanwhile was told so before we had pinned it.
            gone = done.difference(await read()) if done else done
            break
        except Unavailable as error:
            logger.warning("pins: %s; again in %g s", error.message, retry_s)
            await asyncio.sleep(retry_s)
    for ref in gone:
        with contextlib.suppress(ServeError, RegistryError):  # then nothing of it is here
            await unpin(str(ref))


async def _pin(ref: ModelRef, pin: Callable[[str], Awaitable[object]]) -> None:
    try:
        await pin(str(ref))
    except Unavailable:
        raise
    except (ServeError, RegistryError) as error:
        # It may have been deleted, or have no room beside other pins: an operator sees it in the log, and
        # that it is not pinned in `flatshare replicas`.
        logger.warning("%s can't be pinned here: %s", ref, error)
