"""The place where long bodies are decoded: few at a time, in turns of tenants, beside the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from flatshare.api.decoding import INLINE_BYTES, DecodeRoom


async def test_the_event_loop_goes_on_while_a_body_is_decoded() -> None:
    room, go = DecodeRoom(1), threading.Event()
    running = asyncio.create_task(room.run("acme", lambda: go.wait(10)))
    for _ in range(100):
        await asyncio.sleep(0)  # the loop turns although the work has not ended
    assert not running.done()
    assert room.busy == 1
    go.set()
    assert await running is True
    room.close()


async def test_tenants_take_turns() -> None:
    room, go, order = DecodeRoom(1), threading.Event(), []
    first = asyncio.create_task(room.run("flood", lambda: go.wait(10)))
    await asyncio.sleep(0)
    flood = [asyncio.create_task(room.run("flood", lambda n=n: order.append(f"flood {n}"))) for n in range(5)]  # type: ignore[misc]
    await asyncio.sleep(0)
    other = asyncio.create_task(room.run("quiet", lambda: order.append("quiet")))
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(first, *flood, other)
    assert order.index("quiet") <= 1
    room.close()


async def test_a_caller_that_goes_away_leaves_its_place_taken_until_its_work_ends() -> None:
    room, go, began = DecodeRoom(1), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go.wait(10)

    running = asyncio.create_task(room.run("acme", work))
    await asyncio.to_thread(began.wait, 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert room.busy == 1, "its thread still works"
    following = asyncio.create_task(room.run("acme", lambda: 7))
    go.set()
    assert await following == 7
    room.close()


async def test_short_work_is_done_at_once() -> None:
    room = DecodeRoom(1)
    assert room.here_or_there("acme", INLINE_BYTES, lambda: 1) == 1
    found = room.here_or_there("acme", INLINE_BYTES + 1, threading.current_thread)
    assert not isinstance(found, threading.Thread)
    assert await found is not threading.current_thread()
    room.close()


async def test_a_failure_is_the_callers_and_gives_the_place_back() -> None:
    room = DecodeRoom(1)

    def fail() -> None:
        raise ValueError("bad")

    for _ in range(3):
        with pytest.raises(ValueError, match="bad"):
            await room.run("acme", fail)
    assert await room.run("acme", lambda: 1) == 1
    room.close()
