"""Which replicas of other nodes to ask for a tenant's tensors, and the key that identifies the asker.

The ring says it: the replica that was a model's home before places came or went is next in its order, and
copies are there too. So the first nodes of a tenant's order are those that most likely have its weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from flatshare.placement.ring import ring_of
from flatshare.pool.details import DoorAddress
from flatshare.pool.doors import ask_replicas
from flatshare.pool.kept import shared_peer_key
from flatshare.weights.peers import PEERS_ASKED, Peer

__all__ = ["PeerDoors"]

logger = logging.getLogger("flatshare.pool")

FRESH_S: Final = 10.0
"""Seconds after which replicas are asked again where they listen, when a load wants to know."""

FEW_FRESH_S: Final = 1.0
"""The same while no other node is known: at the start of a pool replicas begin one after the other."""

LOOK_S: Final = 0.25
"""Seconds that a load waits for such a look."""

KEY_BYTES: Final = 32


class PeerDoors:
    """Knows the doors of the pool's other nodes. Its event loop looks; threads of loads read.

    Parameters
    ----------
    host
        This node's address.
    ask
        Asks every replica where it listens; blocks.
    key_of
        Returns the pool's key; proposes the given one if there is none yet. Blocks.
    """

    def __init__(
        self,
        host: str,
        ask: Callable[[], Iterable[DoorAddress]] = ask_replicas,
        key_of: Callable[[bytes], bytes] = shared_peer_key,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._ask = ask
        self._key_of = key_of
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._key: bytes | None = None
        self._by_place: dict[int, Peer] = {}
        self._looked_at = float("-inf")
        self._look: asyncio.Task[None] | None = None

    def key(self) -> bytes | None:
        """The pool's key; None until it was read."""
        return self._key

    def of(self, tenant: str) -> Sequence[Peer]:
        """Doors to ask for a tenant, the likeliest first, one a node; as far as they are known now.

        Not to be called on the event loop: it may wait for it.
        """
        age_s = self._clock() - self._looked_at
        found = self._of(tenant)
        if not found and age_s > FEW_FRESH_S:
            looking = asyncio.run_coroutine_threadsafe(self._looked(), self._loop)
            with contextlib.suppress(TimeoutError):
                looking.result(LOOK_S)
            return self._of(tenant)
        if age_s > FRESH_S:
            self._loop.call_soon_threadsafe(self.look)
        return found

    def _of(self, tenant: str) -> Sequence[Peer]:
        by_place = self._by_place  # replaced as a whole by each look
        by_host: dict[str, Peer] = {}
        for place in ring_of(by_place).homes(tenant):
            peer = by_place[place]
            if peer.host != self._host:
                by_host.setdefault(peer.host, peer)
            if len(by_host) == PEERS_ASKED:
                break
        return tuple(by_host.values())

    def look(self) -> asyncio.Task[None]:
        """Look once where replicas listen, unless a look is under way. Raises nothing."""
        if self._look is None or self._look.done():
            self._looked_at = self._clock()
            self._look = self._loop.create_task(self._once(), name="look for peers")
        return self._look

    async def _looked(self) -> None:
        await asyncio.shield(self.look())

    async def _once(self) -> None:
        try:
            if self._key is None:
                self._key = await asyncio.to_thread(self._key_of, secrets.token_bytes(KEY_BYTES))
            doors = await asyncio.to_thread(lambda: list(self._ask()))
        except Exception as error:  # ray has a dozen kinds; it is looked for again
            logger.warning("nobody said where other nodes' replicas listen: %s", type(error).__name__)
            return
        self._by_place = {door.place: Peer(door.host, door.port) for door in doors}
