"""A tenant that is being erased is answered no more: not a new request, and not one that is under way."""

from __future__ import annotations

import asyncio

import pytest

from flatshare_registry.errors import NotFound

from .story import ACME, Story, rows_of


async def test_a_fenced_tenant_is_not_let_in_and_others_are() -> None:
    story = Story()
    await story.ask()
    story.service.fence(ACME, 30)
    for _ in range(2):
        with pytest.raises(NotFound, match="no tenant acme"):
            await story.enter()
    assert (await story.ask("globex")).version.tenant == "globex"
    assert story.runs.ran == ["acme@1", "globex@1"]


async def test_a_fence_holds_for_its_time_and_not_longer() -> None:
    story = Story()
    story.service.fence(ACME, 30)
    story.clock.advance(29.9)
    with pytest.raises(NotFound):
        await story.enter()
    story.clock.advance(0.1)
    for _ in range(2):
        assert (await story.ask()).version.tenant == "acme"


async def test_a_fence_that_comes_before_the_lease_stops_the_request_and_its_load() -> None:
    story = Story()
    with await story.enter() as ticket:
        story.service.fence(ACME, 30)
        with pytest.raises(NotFound, match="no tenant acme"):
            await story.service.predict(ticket, lambda network: rows_of(1))
    assert (story.loader.loads, story.runs.ran) == ([], [])


async def test_a_fence_that_comes_while_the_rows_are_decoded_stops_the_request() -> None:
    story = Story()
    await story.ask()

    def decode(network: object):  # type: ignore[no-untyped-def]  # as Decode
        story.service.fence(ACME, 30)
        return rows_of(1)

    with await story.enter() as ticket:
        with pytest.raises(NotFound):
            await story.service.predict(ticket, decode)
    assert story.runs.ran == ["acme@1"], "no second pass"


async def test_an_answer_that_is_ready_after_the_fence_came_is_not_given() -> None:
    story = Story()
    story.runs.gate = asyncio.Event()
    running = asyncio.create_task(story.ask())
    await story.runs.entered.wait()
    story.service.fence(ACME, 30)
    story.runs.gate.set()
    with pytest.raises(NotFound, match="no tenant acme"):
        await running
    assert story.leases == 0


async def test_a_request_that_waits_for_a_load_is_not_answered_after_the_fence() -> None:
    story = Story()
    gate = story.loader.gate("acme@1")
    running = asyncio.create_task(story.ask())
    while not story.loader.loads:
        await asyncio.sleep(0)
    story.service.fence(ACME, 30)
    gate.set()
    with pytest.raises(NotFound):
        await running


async def test_each_tenant_has_a_fence_of_its_own_and_a_later_one_counts() -> None:
    story = Story()
    story.service.fence(ACME, 10)
    story.service.fence(ACME, 100)
    story.clock.advance(50)
    assert (await story.ask("globex")).version.tenant == "globex"
    with pytest.raises(NotFound):
        await story.enter()
