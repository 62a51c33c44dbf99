"""Fair shares under overload, in simulated time: who asks for less than a share gets all of it, the flood the rest."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from flatshare.errors import DeadlineExceeded, Overloaded
from flatshare.residency.fair_semaphore import FairSemaphore

from ....simulated_time import in_simulated_time

PLACES = 4
SERVICE_S = 0.01
CAPACITY = PLACES / SERVICE_S  # requests a second
SECONDS = 5.0


async def offer(offered: dict[str, float]) -> tuple[Counter[str], Counter[str], dict[str, float]]:
    """Offer so many requests a second of each tenant; what was answered, what was asked, the longest waits."""
    loop = asyncio.get_running_loop()
    admission = FairSemaphore(PLACES, 64)
    answered: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    waits: dict[str, float] = {}

    async def request(tenant: str) -> None:
        asked[tenant] += 1
        came = loop.time()
        try:
            async with admission.hold(30, tenant):
                waits[tenant] = max(waits.get(tenant, 0.0), loop.time() - came)
                await asyncio.sleep(SERVICE_S)
                answered[tenant] += 1
        except (Overloaded, DeadlineExceeded):
            pass

    async def tenant(name: str, rate: float) -> None:
        running: set[asyncio.Task[None]] = set()
        for number in range(int(rate * SECONDS)):
            await asyncio.sleep(max(number / rate - loop.time(), 0))
            task = asyncio.create_task(request(name))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    await asyncio.gather(*[tenant(name, rate) for name, rate in offered.items()])
    return answered, asked, waits


@pytest.mark.parametrize("share", [0.05, 0.2, 0.3])
def test_two_small_tenants_get_all_they_ask_beside_one_that_offers_eight_times_the_capacity(
    share: float,
) -> None:
    """A fair share of three is a third of the capacity; the small ones ask for less."""

    async def work() -> None:
        small = CAPACITY * share
        answered, asked, waits = await offer({"flood": 8 * CAPACITY, "a": small, "b": small})
        for name in ("a", "b"):
            assert answered[name] == asked[name], "not one was refused"
            assert waits[name] < 10 * SERVICE_S, "nor did it wait behind the flood"
        total = sum(answered.values())
        assert total >= 0.95 * CAPACITY * SECONDS, "nothing is left idle"
        assert answered["flood"] >= 0.9 * (CAPACITY * SECONDS - 2 * small * SECONDS)

    in_simulated_time(work())


def test_three_that_all_ask_too_much_get_a_third_each() -> None:
    async def work() -> None:
        answered, _, _ = await offer({"flood": 8 * CAPACITY, "a": CAPACITY, "b": CAPACITY})
        for name in ("flood", "a", "b"):
            assert answered[name] == pytest.approx(CAPACITY * SECONDS / 3, rel=0.1)

    in_simulated_time(work())
