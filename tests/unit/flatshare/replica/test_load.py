"""The load meter: requests are counted, those under way are means of looks; old looks are forgotten."""

from __future__ import annotations

import asyncio
import time

import pytest

from flatshare.replica.load import SAMPLE_S, WINDOW_S, LoadMeter, Reading
from flatshare.weights.tiers import ModelKey

ACME = ModelKey("acme", 1)


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.reading = Reading(0, 0, 0)
        self.meter = LoadMeter(lambda: self.reading, lambda: self.now)

    def looks(self, count: int, requests_each: int = 0, **changed: object) -> None:
        for _ in range(count):
            self.now += SAMPLE_S
            values = {"ongoing": 0, "loading": 0, "leases": {}, **changed}
            self.reading = Reading(requests=self.reading.requests + requests_each, **values)  # type: ignore[arg-type]  # by name
            self.meter.look()


def test_requests_of_no_length_are_counted() -> None:
    world = World()
    world.looks(100, requests_each=9)
    seen = world.meter.measured()
    assert seen.ongoing == 0
    assert seen.requests_per_s == pytest.approx(90, rel=0.1)
    assert seen.idle_s == pytest.approx(0, abs=SAMPLE_S)


def test_those_under_way_are_a_mean_over_the_window_by_model() -> None:
    world = World()
    world.looks(100, ongoing=8, loading=2, leases={ACME: 6})
    world.looks(int(WINDOW_S / SAMPLE_S) // 2, ongoing=0)
    seen = world.meter.measured()
    assert seen.ongoing == pytest.approx(4, rel=0.2)
    assert seen.loading == pytest.approx(1, rel=0.2)
    assert seen.models[ACME] == pytest.approx(3, rel=0.2)


def test_what_was_before_the_window_is_forgotten() -> None:
    world = World()
    world.looks(50, requests_each=5, ongoing=8, leases={ACME: 6})
    world.looks(int(WINDOW_S / SAMPLE_S) + 2)
    seen = world.meter.measured()
    assert (seen.ongoing, seen.requests_per_s, dict(seen.models)) == (0, 0, {})
    assert seen.idle_s == pytest.approx(WINDOW_S + 2 * SAMPLE_S)


def test_the_first_answer_is_of_one_look() -> None:
    world = World()
    world.reading = Reading(3, 1, 7)
    seen = world.meter.measured()
    assert (seen.ongoing, seen.loading, seen.requests_per_s, seen.idle_s) == (3, 1, 0, 0)


async def test_it_looks_by_itself_until_it_is_closed() -> None:
    looked = asyncio.Event()

    def read() -> Reading:
        looked.set()
        return Reading(0, 0, 0)

    meter = LoadMeter(read)
    meter.start()
    await asyncio.wait_for(looked.wait(), 5)
    meter.close()
    looked.clear()
    await asyncio.sleep(2 * SAMPLE_S)  # nothing is to happen: only time shows it
    assert not looked.is_set()


async def test_an_event_loop_that_comes_late_is_seen() -> None:
    looks = asyncio.Semaphore(0)

    def read() -> Reading:
        looks.release()
        return Reading(0, 0, 0)

    meter = LoadMeter(read)
    meter.start()
    async with asyncio.timeout(5):
        await looks.acquire()
        assert meter.lag_s == 0
        time.sleep(SAMPLE_S + 0.2)  # noqa: ASYNC251  # as a callback that computes would
        await looks.acquire()
    meter.close()
    assert 0.15 < meter.lag_s < 5
