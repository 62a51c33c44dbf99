"""A starting replica restores its fleet's pins: pins belong to the registry, not to one process."""

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
    """Pin every pinned ref, one after the other; retries while the store does not answer. Raises nothing.

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
            # For refs that were unpinned meanwhile, that call came before we had pinned them.
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
        # It may have been deleted, or other pins may leave it no room. An operator sees this in the log, and
        # sees in `flatshare replicas` that it is not pinned.
        logger.warning("%s can't be pinned here: %s", ref, error)
