"""FairSemaphore: bounded work, bounded waiting, in order."""

import asyncio

import pytest

from flatshare.errors import DeadlineExceeded, Overloaded, WouldBeLate
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare_registry.testing.faults import ManualClock


async def test_bounds_and_order() -> None:
    admission = FairSemaphore(max_ongoing=2, max_queued=2)
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
    admission = FairSemaphore(max_ongoing=1, max_queued=5)
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
    admission = FairSemaphore(max_ongoing=1, max_queued=5)
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
    admission = FairSemaphore(max_ongoing=1, max_queued=0)
    with pytest.raises(ValueError):
        async with admission.hold(5):
            assert admission.ongoing == 1
            raise ValueError
    assert admission.ongoing == 0


async def test_one_tenants_flood_does_not_take_the_places_of_others() -> None:
    admission = FairSemaphore(1, 10)
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


async def waiting(admission: FairSemaphore, *tenants: str, timeout_s: float = 30) -> list[asyncio.Task[None]]:
    """Requests that wait, in this order."""
    tasks = [asyncio.create_task(admission.enter(timeout_s, tenant)) for tenant in tenants]
    await asyncio.sleep(0)
    return tasks


async def let_in(admission: FairSemaphore, tasks: list[asyncio.Task[None]]) -> list[int]:
    """In which order requests come in as places come free."""
    order: list[int] = []
    for _ in tasks:
        admission.leave()
        for _ in range(3):
            await asyncio.sleep(0)
        order += [at for at, task in enumerate(tasks) if task.done() and at not in order]
    return order


async def test_places_that_come_free_go_round_the_tenants_and_within_one_in_order() -> None:
    admission = FairSemaphore(1, 10)
    await admission.enter(1, "a")
    tasks = await waiting(admission, "a", "a", "a", "b", "b", "c")
    assert await let_in(admission, tasks) == [0, 3, 5, 1, 4, 2]
    assert (admission.ongoing, admission.queued) == (1, 0)
    admission.leave()
    assert admission.ongoing == 0


async def test_a_place_is_taken_only_from_who_has_clearly_more_waiting_and_from_the_newest() -> None:
    admission = FairSemaphore(1, 4)
    await admission.enter(1, "a")
    many = await waiting(admission, "a", "a", "b", "a")
    (first,) = await waiting(admission, "c")
    await asyncio.sleep(0)
    assert isinstance(many[3].exception(), Overloaded), "the newest of who has three, where c has none"
    assert [task.done() for task in (*many[:3], first)] == [False] * 4
    assert (admission.refused, admission.queued) == (1, 4)
    for tenant in ("b", "c"):  # who has one could get a second only from one that has three
        with pytest.raises(Overloaded):
            await admission.enter(1, tenant)
    with pytest.raises(Overloaded, match="works on 1 requests and 4 more wait"):
        await admission.enter(1, "a")
    assert (admission.refused, admission.queued) == (4, 4)
    (other,) = await waiting(admission, "d")
    await asyncio.sleep(0)
    assert isinstance(many[1].exception(), Overloaded), "two are clearly more than none"
    assert await let_in(admission, [many[0], many[2], first, other]) == [0, 1, 2, 3]


async def test_where_nobody_may_wait_the_next_is_refused_at_once() -> None:
    admission = FairSemaphore(1, 0)
    await admission.enter(1, "a")
    for refused in (1, 2):
        with pytest.raises(Overloaded):
            await admission.enter(1, "b")
        assert (admission.refused, admission.queued, admission.ongoing) == (refused, 0, 1)


async def test_who_stops_waiting_takes_nobody_elses_place_in_the_queue() -> None:
    admission = FairSemaphore(1, 10)
    await admission.enter(1, "a")
    tasks = await waiting(admission, "a", "a", "b", "a")
    tasks[1].cancel()
    tasks[2].cancel()
    await asyncio.gather(*tasks[1:3], return_exceptions=True)
    assert admission.queued == 2
    assert await let_in(admission, [tasks[0], tasks[3]]) == [0, 1]
    admission.leave()
    assert (admission.ongoing, admission.queued) == (0, 0)


async def test_who_was_refused_and_cancelled_at_once_gives_no_place_away() -> None:
    admission = FairSemaphore(1, 2)
    await admission.enter(1, "a")
    tasks = await waiting(admission, "a", "a")
    taker = asyncio.create_task(admission.enter(30, "b"))
    tasks[1].cancel()  # at the moment in which b is given its place
    for _ in range(3):
        await asyncio.sleep(0)
    assert tasks[1].done() and not tasks[0].done() and not taker.done()
    assert (admission.ongoing, admission.queued) == (1, 2)
    assert await let_in(admission, [tasks[0], taker]) == [0, 1]
    admission.leave()
    assert admission.ongoing == 0


async def test_a_request_that_waits_too_long_says_how_long() -> None:
    admission = FairSemaphore(1, 2)
    async with admission.hold(1, "a"):
        with pytest.raises(DeadlineExceeded, match=r"waited 0.02 s for a free place"):
            async with admission.hold(0.02, "b"):
                raise AssertionError("let in")
        assert (admission.ongoing, admission.queued, admission.refused) == (1, 0, 0)
    assert admission.ongoing == 0


@pytest.mark.parametrize("next_one", ["a", "b"])
async def test_a_place_does_not_go_to_who_is_just_being_cancelled(next_one: str) -> None:
    admission = FairSemaphore(1, 10)
    await admission.enter(1, "a")
    leaving, staying = await waiting(admission, "a", next_one)
    leaving.cancel()
    admission.leave()  # before the one that is cancelled could tell
    assert (admission.ongoing, admission.queued) == (1, 0)
    await asyncio.wait_for(staying, 30)
    assert isinstance((await asyncio.gather(leaving, return_exceptions=True))[0], asyncio.CancelledError)
    admission.leave()
    assert (admission.ongoing, admission.queued) == (0, 0)


async def test_who_is_cancelled_while_others_of_its_tenant_wait_on_is_forgotten_once() -> None:
    admission = FairSemaphore(1, 10)
    await admission.enter(1, "a")
    first, second, third = await waiting(admission, "a", "a", "a")
    first.cancel()
    admission.leave()  # passes the first by, and lets the second in
    assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], asyncio.CancelledError)
    assert admission.queued == 1 and second.done() and not third.done()
    assert await let_in(admission, [third]) == [0]


async def queued(semaphore: FairSemaphore, tenant: str, count: int) -> list[asyncio.Task[None]]:
    """So many of a tenant's requests that wait, and will leave when they are let in."""
    tasks = [asyncio.create_task(semaphore.enter(None, tenant)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def served(semaphore: FairSemaphore, clock: ManualClock, times: int, each_s: float) -> None:
    """Places come free, one after so many seconds."""
    for _ in range(times):
        clock.advance(each_s)
        semaphore.leave()
        await asyncio.sleep(0)


async def test_who_would_be_late_is_refused_at_once_and_told_when_to_come_again() -> None:
    clock = ManualClock()
    places = FairSemaphore(2, 100, clock)
    assert places.enter_now() and places.enter_now()
    flood = await queued(places, "flood", 60)
    assert places.wait_s("flood") == 0.0
    places.check_in_time(0.001, "flood")  # a rate that is not known refuses nobody
    await served(places, clock, 20, 0.5)
    assert places.wait_s("flood") == pytest.approx(41 * 0.5)
    assert places.wait_s("quiet") == pytest.approx(2 * 0.5), "tenants take turns"
    with pytest.raises(WouldBeLate, match="in about 20 s, and it has 10 s") as refused:
        await places.enter(10.0, "flood")
    assert refused.value.retry_after_s == 11
    (quiet,) = await queued(places, "quiet", 1)
    await served(places, clock, 2, 0.5)
    assert quiet.done(), "and who would be in time is let in"
    await served(places, clock, 40, 0.5)
    assert all(task.done() for task in flood)
    await served(places, clock, 1, 0.5)
    assert places.has_room and places.wait_s("flood") == 0.0


async def test_a_store_that_was_slow_a_while_ago_refuses_nobody() -> None:
    clock = ManualClock()
    places = FairSemaphore(1, 100, clock)
    assert places.enter_now()
    await queued(places, "a", 20)
    await served(places, clock, 20, 10.0)
    places.leave()
    assert places.enter_now()
    await queued(places, "a", 3)
    assert places.wait_s("a") == 0.0
    places.check_in_time(0.5, "a")


async def test_a_time_that_is_over_is_no_reason_where_there_is_room() -> None:
    places = FairSemaphore(1, 1)
    places.check_in_time(-3.0)
    assert places.refused == 0
