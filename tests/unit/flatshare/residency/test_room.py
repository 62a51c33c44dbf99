"""Waiting for room: in order, without a sleeper beside room, and without one waiter's trouble being another's."""

from __future__ import annotations

import asyncio

import pytest

from flatshare.errors import ResidentOverQuota
from flatshare.residency.room import RoomQueue


async def waiting(queue: RoomQueue, question) -> asyncio.Task[bool]:  # type: ignore[no-untyped-def]  # any
    task = asyncio.create_task(queue.wait(question, 30))
    await asyncio.sleep(0)
    return task


async def test_a_question_that_raises_is_its_own_waiters_failure() -> None:
    queue, free, over = RoomQueue(), False, False

    def noisy() -> bool:
        if over:
            raise ResidentOverQuota("the model takes more than noisy may keep")
        return False

    first = await waiting(queue, noisy)
    second = await waiting(queue, lambda: free)
    over = free = True
    queue.wake()  # from another request's release: it must not see anything of this
    with pytest.raises(ResidentOverQuota):
        await first
    assert await second is True, "the room went to the next one"


async def test_the_first_that_can_use_it_gets_the_room() -> None:
    queue, order = RoomQueue(), []
    tasks = [await waiting(queue, lambda n=n: n in order) for n in range(3)]  # type: ignore[misc]
    order.append(1)
    queue.wake()
    await asyncio.sleep(0)
    assert [task.done() for task in tasks] == [False, True, False]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_is_cancelled_as_it_is_let_go_passes_the_room_on() -> None:
    queue, free = RoomQueue(), False
    first, second = await waiting(queue, lambda: free), await waiting(queue, lambda: free)
    free = True
    queue.wake()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second is True


async def test_a_failure_in_the_moment_of_a_time_out_is_told() -> None:
    queue = RoomQueue()
    over = False

    def question() -> bool:
        if over:
            raise ResidentOverQuota("over")
        return False

    assert await queue.wait(question, 0.01) is False
    over = True
    with pytest.raises(ResidentOverQuota):
        await queue.wait(question, 0.01)
