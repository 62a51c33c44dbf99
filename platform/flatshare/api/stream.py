"""``POST /predict/stream``: many requests in one, a line of JSON each; answers as they are ready.

Lines are read as they arrive and at most ``IN_FLIGHT`` are worked on at a time, so memory is bounded by
these and not by the stream. An answer names its line by ``index``; one bad line fails only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from flatshare.api.error_table import describe_error
from flatshare.errors import BadInput, Forbidden, OverQuota, Suspended, TooLarge, TooSlow, Unauthenticated
from flatshare.replica.ticket import Prediction

__all__ = ["IN_FLIGHT", "LinesResponse", "answers", "lines_of"]

IDLE_S: Final = 60.0
"""Seconds without a byte after which a stream ends: it holds a place of the replica's."""

LINE_S: Final = 30.0
"""Seconds in which a line must be here once it has begun: a stream that drips holds a place too."""

BAD_LINES: Final = 100
"""Invalid lines in a row after which a stream ends: a client that sends so many is not sending requests."""

IN_FLIGHT: Final = 16
"""Lines worked on at a time: enough to fill passes, few enough that one stream is not a flood."""


class LinesResponse(StreamingResponse):
    """A streaming response that leaves the request's body to its own generator.

    With a server of an older ASGI, Starlette's response reads messages to learn that the client went away,
    and these would be the body's. Here the body's reader sees the disconnect.

    Parameters
    ----------
    held
        Let go of when the stream has ended, however it ended.
    """

    def __init__(
        self, content: AsyncGenerator[bytes, None], held: AbstractContextManager[Any], *, media_type: str
    ) -> None:
        super().__init__(content, media_type=media_type)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        source = self.body_iterator
        with self._held:
            try:
                await self.stream_response(send)
            finally:
                if isinstance(source, AsyncGenerator):
                    await source.aclose()  # a client that went away ends what runs for it


async def lines_of(
    chunks: AsyncIterator[bytes], limit_bytes: int, hold: Callable[[int], None] = lambda size: None
) -> AsyncIterator[bytes]:
    """Lines of a body, without their ends; empty ones are skipped.

    Parameters
    ----------
    hold
        Called with the bytes held of a line that is not complete yet; raises to end the stream.

    Raises
    ------
    TooLarge
        A line is longer than the limit.
    TooSlow
        Nothing came for ``IDLE_S`` seconds, or a line was not whole within ``LINE_S``.
    """
    rest = bytearray()  # grows in place: a long line that comes in many pieces is copied once
    source = aiter(chunks)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + IDLE_S
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(source)
        except StopAsyncIteration:
            break
        except TimeoutError:
            raise TooSlow(f"nothing came for {IDLE_S:g} s, or a line took {LINE_S:g} s") from None
        *whole, last = chunk.split(b"\n")
        for piece in whole:
            if len(rest) + len(piece) > limit_bytes:
                raise TooLarge(f"a line is longer than the limit of {limit_bytes} bytes")
            line = bytes(rest) + piece
            rest.clear()
            hold(0)  # the line is its request's now
            if line.strip():
                yield line
        if len(rest) + len(last) > limit_bytes:
            raise TooLarge(f"a line is longer than the limit of {limit_bytes} bytes")
        if not rest:  # a new line begins with this chunk
            deadline = loop.time() + (LINE_S if last else IDLE_S)
        hold(len(rest) + len(last))
        rest += last
    if rest.strip():
        yield bytes(rest)


async def answers(
    lines: AsyncIterator[bytes],
    predict: Callable[[bytes], Awaitable[Prediction]],
    request_id: str,
    another_place: Callable[[], AbstractContextManager[object] | None] = contextlib.nullcontext,
) -> AsyncGenerator[bytes, None]:
    """Lines of answers, each as soon as it is ready; ends what is under way when it is closed.

    Parameters
    ----------
    predict
        Answers one line.
    another_place
        Gives a context for each line that is worked on beside the first; None while the tenant may have no
        more: then the next line waits until another line of this stream has ended.
    """
    bad = 0  # lines in a row that can never work
    read: bytes | None = None  # the next line, which waits for a place
    running: set[asyncio.Task[bytes]] = set()
    refused = asyncio.Event()  # nothing more will be answered: no use in reading on
    index = 0
    source = aiter(lines)
    reading: asyncio.Task[bytes] | None = asyncio.ensure_future(_next(source))

    async def one(number: int, line: bytes) -> bytes:
        nonlocal bad
        try:
            prediction = await predict(line)
        except OverQuota as error:
            # Answered only after the time that it should wait: a stream can't exceed its tenant's rate.
            await asyncio.sleep(error.retry_after_s or 1)
            return _failure(number, error, request_id)
        except (Unauthenticated, Forbidden, Suspended) as error:
            refused.set()
            return _failure(number, error, request_id)
        except BadInput as error:
            bad += 1
            if bad >= BAD_LINES:
                refused.set()
            return _failure(number, error, request_id)
        except Exception as error:  # one line's failure is its own answer
            return _failure(number, error, request_id)
        bad = 0
        return _line({
            "index": number,
            "predicted_label": prediction.label_list(),
            "version": prediction.version.version,
            "tier": prediction.tier.value,
        })  # fmt: skip

    try:
        while reading is not None or running or read is not None:
            if read is not None:
                place = contextlib.nullcontext() if not running else another_place()
                if place is not None:
                    task = asyncio.create_task(one(index, read))
                    # Not within the task: one that is cancelled before its first step does not begin.
                    task.add_done_callback(functools.partial(_give_back, place))
                    running.add(task)
                    read = None
                    index += 1
                    reading = asyncio.ensure_future(_next(source))
            waiting: set[asyncio.Task[Any]] = set(running)
            if reading is not None and len(running) < IN_FLIGHT:
                waiting.add(reading)
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is not reading:
                    running.discard(task)
                    yield task.result()
            if refused.is_set():
                read = None
                if reading is not None:
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
                    reading = None
            if reading is not None and reading in done:
                try:
                    line = reading.result()
                except StopAsyncIteration:
                    reading = None
                except Exception as error:  # the body can't be read on: say so, and answer what came before
                    reading = None
                    yield _failure(index, error, request_id)
                else:
                    read, reading = line, None
    finally:
        rest = [*running, *([reading] if reading is not None else [])]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def _give_back(place: AbstractContextManager[object], task: asyncio.Task[bytes]) -> None:
    place.__exit__(None, None, None)


async def _next(source: AsyncIterator[bytes]) -> bytes:
    return await anext(source)


def _failure(index: int, error: Exception, request_id: str) -> bytes:
    described = describe_error(error)
    details = {"code": described.code, "message": described.message, "request_id": request_id}
    return _line({"index": index, "error": details})


def _line(document: dict[str, Any]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)
