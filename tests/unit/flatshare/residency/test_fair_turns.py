"""``residency/fair_semaphore.py`` as loads use it: permits go round the tenants that wait, as long as it takes."""

from __future__ import annotations

import asyncio

from flatshare.residency.fair_semaphore import FairSemaphore


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_that_floods_waits_behind_itself() -> None:
    turns = FairSemaphore(1)
    order: list[str] = []
    gate = asyncio.Event()

    async def load(tenant: str) -> None:
        async with turns.hold(None, tenant):
            order.append(tenant)
            await gate.wait()

    tasks = [asyncio.create_task(load("flood")) for _ in range(6)]
    await settle()
    tasks += [asyncio.create_task(load(name)) for name in ("a", "b", "a")]
    await settle()
    assert order == ["flood"]
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["flood", "flood", "a", "b", "flood", "a", "flood", "flood", "flood"]


async def test_who_goes_away_while_waiting_leaves_no_hole() -> None:
    turns = FairSemaphore(2)
    inside = 0
    most = 0

    async def load(tenant: str) -> None:
        nonlocal inside, most
        async with turns.hold(None, tenant):
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(0)
            finally:
                inside -= 1

    for round_ in range(20):
        tasks = [asyncio.create_task(load(f"t{n % 3}")) for n in range(12)]
        for _ in range(round_ % 4):
            await asyncio.sleep(0)
        for task in tasks[round_ % 5 :: 3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (inside, most) == (0, 2)
    async with turns.hold(None, "x"), turns.hold(None, "y"):
        pass  # both places came back
