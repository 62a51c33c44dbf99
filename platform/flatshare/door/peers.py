"""Serves tensors of this node's host tier to replicas of other nodes (``weights/peers.py``)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from flatshare.threads import ThreadWork
from flatshare.weights.host_tier import HostTier
from flatshare.weights.peers import HAVE_HEADER, SIGNATURE_HEADER, PeerAsked, read_peer_request

__all__ = ["TierServer"]

logger = logging.getLogger("flatshare.door")

MOST_AT_ONCE: Final = 4
"""Answers under way at a time; beyond them the answer is 503, and the peer asks another replica. A replica is
here for predictions first."""

MOST_REQUEST_BYTES: Final = 1024**2
"""Longest request: some ten thousand tensors."""

SEND_S: Final = 10.0
"""Seconds that an answer may take: what it has mapped can't be erased meanwhile."""

PIECE_BYTES: Final = 256 * 1024
"""Bytes sent at a time: other requests wait some 50 us for the event loop meanwhile; longer on a disk."""


class TierServer:
    """Sends tensors of this node's tier to peers that show the pool's key. An ASGI app of one route.

    Parameters
    ----------
    work
        Work under way by tenant: an erasure waits for answers under way, and no new one begins.
    key
        The key that the pool's replicas share; None while this replica does not know it.
    """

    def __init__(
        self,
        tier: HostTier,
        work: ThreadWork,
        key: Callable[[], bytes | None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._tier = tier
        self._work = work
        self._key = key
        self._clock = clock
        self._ongoing = 0
        self._threads = ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="peer")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request: 200 with tensors, 404 without any; 401, 405, 413 or 503."""
        if scope["method"] != "POST":
            await _refuse(405, scope, receive, send)
            return
        signature = _signature(scope)
        if not signature:  # nobody without one takes a place
            await _refuse(401, scope, receive, send)
            return
        if self._ongoing >= MOST_AT_ONCE:
            await _refuse(503, scope, receive, send)
            return
        self._ongoing += 1
        try:
            async with asyncio.timeout(SEND_S):
                await self._answer(signature, scope, receive, send)
        except TimeoutError:
            logger.warning("a peer took its tensors too slowly: its answer was cut")
        finally:
            self._ongoing -= 1

    async def _answer(self, signature: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:
            await _refuse(413, scope, receive, send)
            return
        key = self._key()
        asked = read_peer_request(key, body, signature, self._clock()) if key is not None else None
        if asked is None:
            await _refuse(401, scope, receive, send)
            return
        with self._work.counted(asked.tenant) as may_go_on:
            # Counted for itself too: a thread goes on when nobody waits for it any more.
            found = (
                await self._work.run(self._threads, asked.tenant, lambda: self._open(asked))
                if may_go_on
                else {}
            )
            if not found:
                await _refuse(404, scope, receive, send)
                return
            have = sum(1 << index for index in found)
            length = sum(view.nbytes for view in found.values())
            headers = [
                (HAVE_HEADER.encode(), f"{have:x}".encode()),
                (b"content-length", str(length).encode()),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for index in sorted(found):
                view = found.pop(index)
                for start in range(0, view.nbytes, PIECE_BYTES):
                    if self._work.is_stopped(asked.tenant):
                        return  # erased meanwhile: uvicorn cuts an answer that is not whole
                    piece = bytes(view[start : start + PIECE_BYTES])
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    await asyncio.sleep(0)  # uvicorn waits only where its buffer is full
            await send({"type": "http.response.body", "body": b""})

    def _open(self, asked: PeerAsked) -> dict[int, memoryview]:
        views = ((index, self._tier.open(*one)) for index, one in enumerate(asked.tensors))
        return {index: view for index, view in views if view is not None}


def _signature(scope: Scope) -> str:
    """What a request shows; empty for nothing, or for more than one."""
    shown = [value for name, value in scope["headers"] if name == SIGNATURE_HEADER.encode()]
    return shown[0].decode("latin-1") if len(shown) == 1 else ""


async def _body(receive: Receive) -> bytes | None:
    """A request's body; None when it is too long, or the client went away."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_REQUEST_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


async def _refuse(status: int, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"peer": status}, status)(scope, receive, send)
