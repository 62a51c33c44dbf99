"""Admission: bounded work, bounded waiting, in order."""

import asyncio

import pytest

from flatshare.engine.admission import Admission
from flatshare.errors import DeadlineExceeded, Overloaded


async def test_bounds_and_order() -> None:
    admission = Admission(max_ongoing=2, max_queued=2)
    await admission.enter(1)
    await admission.enter(1)
    order: list[int] = []

    async def wait(number: int) -> None:
        await admission.enter(1)
        order.append(number)

    waiting = [asyncio.create_task(wait(number)) for number in range(2)]
    await asyncio.sleep(0)
    assert (admission.ongoing, admission.queued) == (2, 2)
    with pytest.raises(Overloaded) as caught:
        await admission.enter(1)
    assert (caught.value.retry_after_s, admission.refused) == (1, 1)
    admission.leave()
    admission.leave()
    await asyncio.gather(*waiting)
    assert order == [0, 1]
    admission.leave()
    admission.leave()
    assert (admission.ongoing, admission.queued) == (0, 0)


async def test_a_deadline_or_a_cancelled_caller_leaves_no_trace() -> None:
    admission = Admission(max_ongoing=1, max_queued=5)
    await admission.enter(1)
    with pytest.raises(DeadlineExceeded):
        await admission.enter(0.01)
    waiting = asyncio.create_task(admission.enter(1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert admission.queued == 0
    admission.leave()
    assert admission.ongoing == 0


async def test_a_place_given_to_a_caller_that_just_left_is_passed_on() -> None:
    admission = Admission(max_ongoing=1, max_queued=5)
    await admission.enter(1)
    leaving = asyncio.create_task(admission.enter(1))
    staying = asyncio.create_task(admission.enter(1))
    await asyncio.sleep(0)
    admission.leave()  # gives the place to `leaving`
    leaving.cancel()  # before it could run
    await asyncio.gather(leaving, return_exceptions=True)
    await asyncio.wait_for(staying, 30)
    admission.leave()
    assert admission.ongoing == 0


async def test_hold_leaves_on_errors() -> None:
    admission = Admission(max_ongoing=1, max_queued=0)
    with pytest.raises(ValueError):
        async with admission.hold(5):
            assert admission.ongoing == 1
            raise ValueError
    assert admission.ongoing == 0


async def test_one_tenants_flood_does_not_take_the_places_of_others() -> None:
    admission = Admission(1, 10)
    await admission.enter(5, "flood")
    flood = [asyncio.create_task(admission.enter(5, "flood")) for _ in range(10)]
    await asyncio.sleep(0)
    assert admission.queued == 10
    small = [asyncio.create_task(admission.enter(5, "small")) for _ in range(3)]
    for _ in range(3):
        await asyncio.sleep(0)
    refused = [task for task in flood if task.done()]
    assert len(refused) == 3
    assert all(isinstance(task.exception(), Overloaded) for task in refused)
    with pytest.raises(Overloaded):
        await admission.enter(5, "flood")
    for _ in range(2):  # places that come free go round
        admission.leave()
        await asyncio.sleep(0)
    assert sum(task.done() for task in small) == 1
    for _ in range(9):
        admission.leave()
        await asyncio.sleep(0)
    assert all(task.done() for task in (*small, *flood))
    assert (admission.queued, admission.ongoing) == (0, 0)
