"""One run for each key: shared, not cancelled by callers, and begun anew when asked to."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from flatshare.single_flight import SingleFlight


class Runs:
    """Counts runs, and ends them when told."""

    def __init__(self) -> None:
        self.count = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def run(self) -> int:
        self.count += 1
        number = self.count
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return number


async def test_who_asks_meanwhile_shares_its_end() -> None:
    flights, runs = SingleFlight[str, int]("run"), Runs()
    waiting = [asyncio.create_task(flights.join("a", runs.run)) for _ in range(5)]
    other = asyncio.create_task(flights.join("b", runs.run))
    await asyncio.sleep(0)
    assert (len(flights), "a" in flights, "c" in flights) == (2, True, False)
    runs.go.set()
    assert set(await asyncio.gather(*waiting)) == {1}
    assert await other == 2
    assert len(flights) == 0
    assert await flights.join("a", runs.run) == 3, "what has ended is not shared"


async def test_a_caller_that_goes_away_ends_nothing() -> None:
    flights, runs = SingleFlight[str, int]("run"), Runs()
    first = asyncio.create_task(flights.join("a", runs.run))
    second = asyncio.create_task(flights.join("a", runs.run))
    await asyncio.sleep(0)
    first.cancel()
    runs.go.set()
    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_what_is_forgotten_is_begun_anew_and_its_late_end_takes_nothing_away() -> None:
    flights, early, late = SingleFlight[str, int]("run"), Runs(), Runs()
    first = asyncio.create_task(flights.join("a", early.run))
    await asyncio.sleep(0)
    flights.forget("a")
    flights.forget("nobody's")
    late.count = 10
    second = asyncio.create_task(flights.join("a", late.run))
    await asyncio.sleep(0)
    early.go.set()
    assert await first == 1
    assert "a" in flights, "the new run, which the old one's end must not remove"
    late.go.set()
    assert await second == 11


async def test_a_run_that_is_cancelled_before_its_first_step_is_not_joined_for_ever() -> None:
    flights, runs = SingleFlight[str, int]("run"), Runs()
    flights.begin("a", runs.run).cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert "a" not in flights
    runs.go.set()
    assert await flights.join("a", runs.run) == 1


async def test_a_failure_is_told_to_who_waits_and_is_no_forgotten_exception() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    flights, runs = SingleFlight[str, int]("run"), Runs()
    runs.error = ValueError("no")
    runs.go.set()
    flights.begin("nobody waits", runs.run)
    with pytest.raises(ValueError, match="no"):
        await flights.join("a", runs.run)
    gc.collect()
    await asyncio.sleep(0)
    assert reported == []
