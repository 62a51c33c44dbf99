"""The story of a request: what counts as a cold load, what its errors are called, and that leases end."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from flatshare.errors import (
    DeadlineExceeded,
    IsolationBroken,
    ModelFailed,
    NoRoom,
    Overloaded,
    RowsOverQuota,
    Suspended,
    TooLarge,
    TooManyAtOnce,
    TooManyColdLoads,
    TooManyRequests,
)
from flatshare.replica.ticket import FEW_ROWS, Prediction
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare.weights.tiers import ModelKey, State, Tier
from flatshare_registry.errors import NotFound, Unavailable
from flatshare_registry.ids import PRODUCTION, ModelRef
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore

from ....simulated_time import in_simulated_time
from .story import ACME, GLOBEX, Story, rows_of, settle


async def test_cold_loads_are_counted_and_their_rate_is_a_minutes() -> None:
    story = Story()
    await story.limit(cold_loads_per_min=2)
    for value in (5, 6, 7):
        story.register(ACME, value)
    await story.heads.refresh(ACME)
    for ref in ("acme@1", "acme@2"):
        await story.ask(ref)
    with pytest.raises(TooManyColdLoads, match="2 models a minute") as caught:
        await story.ask("acme@3")
    assert story.loader.loads == ["acme@1", "acme@2"], "what is refused is not loaded"
    assert caught.value.retry_after_s in (30, 31)
    story.clock.advance(29)
    with pytest.raises(TooManyColdLoads):
        await story.ask("acme@3")
    story.clock.advance(1.01)
    assert (await story.ask("acme@3")).tier is Tier.STORE
    with pytest.raises(TooManyColdLoads):
        await story.ask("acme@4")
    for _ in range(20):
        assert (await story.ask("acme@1")).tier is Tier.DEVICE, "a hit is no load"


async def test_to_join_a_load_costs_nothing() -> None:
    story = Story()
    await story.limit(cold_loads_per_min=1)
    gate = story.loader.gate("acme@1")
    asking = [asyncio.create_task(story.ask())]
    await settle()
    assert story.loader.loads == ["acme@1"]
    asking += [asyncio.create_task(story.ask()) for _ in range(5)]
    await settle()
    gate.set()
    answers = await asyncio.gather(*asking)
    assert story.loader.loads == ["acme@1"]
    assert [one.tier for one in answers] == [Tier.STORE] * 6


async def test_every_lease_ends_with_its_request_and_a_hit_takes_one() -> None:
    story = Story()
    story.runs.gate = asyncio.Event()
    asking = [asyncio.create_task(story.ask()) for _ in range(3)]
    await settle()
    assert story.leases == 3
    story.runs.gate.set()
    await asyncio.gather(*asking)
    assert story.leases == 0
    story.runs.gate = asyncio.Event()
    hit = asyncio.create_task(story.ask())
    await settle()
    assert story.leases == 1
    story.runs.gate.set()
    assert (await hit).tier is Tier.DEVICE
    assert story.leases == 0
    assert story.cache.stats.hits == {Tier.STORE: 3, Tier.PEER: 0, Tier.HOST: 0, Tier.DEVICE: 1}


async def test_callers_of_a_handle_are_held_to_the_rows_of_their_tenant_too() -> None:
    story = Story()
    await story.limit(rows_per_request=2)
    await story.ask(rows=2)
    story.cache.unload(ModelKey("acme", 1))
    with pytest.raises(RowsOverQuota, match=r"3 rows.*acme may send 2"):
        await story.ask(rows=3)
    assert story.loader.loads == ["acme@1"], "too many rows load nothing"


async def test_rows_are_decoded_within_the_smaller_limit_and_the_tenants_own_is_named() -> None:
    def decode(most: int) -> NDArray[np.float32]:
        asked.append(most)
        if most < 3:
            raise TooLarge(f"more than {most} rows")
        return rows_of(3)

    story, asked = Story(), list[int]()
    for own, most, wanted in ((None, 8, 8), (8, 8, 8), (20, 8, 8), (7, 8, 7)):
        await story.limit(**({} if own is None else {"rows_per_request": own}))
        with await story.enter() as ticket:
            assert len(ticket.decode(most, decode)) == 3
        assert asked.pop() == wanted
    with await story.enter() as ticket, pytest.raises(TooLarge) as caught:
        ticket.decode(2, decode)
    assert not isinstance(caught.value, RowsOverQuota), "anybody's limit is not the tenant's"
    await story.limit(rows_per_request=2)
    with await story.enter() as ticket, pytest.raises(TooLarge) as caught:
        ticket.decode(2, decode)
    assert not isinstance(caught.value, RowsOverQuota), "nor is it where both are the same"
    await story.limit(rows_per_request=2)
    with await story.enter() as ticket, pytest.raises(RowsOverQuota, match="acme: more than 2 rows"):
        ticket.decode(8, decode)


async def test_a_slot_with_other_weights_than_the_ref_resolved_to_answers_nobody() -> None:
    story = Story()
    version = story.registry.version(ACME, 1)
    other = version.model_copy(update={"digest": "f" * 64})  # under the same name: no registry gives that
    (await story.cache.lease(other, 5)).release()
    with pytest.raises(IsolationBroken, match="acme@1 holds other weights"):
        await story.ask()
    assert story.runs.ran == [], "the other weights did not run"
    assert [info.state for info in story.cache.snapshot()] == [State.QUARANTINED]
    again = await story.ask()
    assert (again.version.digest, again.tier) == (version.digest, Tier.STORE)


def test_a_request_that_runs_out_of_time_in_its_pass_says_so() -> None:
    async def work() -> None:
        story = Story(timeout_s=2)
        await story.ask()
        story.runs.gate = asyncio.Event()
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded, match="not answered within 2 s"):
            await story.ask()
        assert asyncio.get_running_loop().time() - began == pytest.approx(2)
        assert story.leases == 0

    in_simulated_time(work())


def test_a_request_that_finds_no_room_until_its_time_is_over_is_told_that() -> None:
    """Not that it took too long: the cache knows why, and is asked a little before the end."""

    async def work() -> None:
        story = Story(slots=1, timeout_s=2)
        story.runs.gate = asyncio.Event()
        other = asyncio.create_task(story.ask("globex"))
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        story.runs.gate, gate = None, story.runs.gate
        holder = story.cache.try_lease(story.registry.version(GLOBEX, 1))
        assert holder is not None
        gate.set()
        await other
        with pytest.raises(NoRoom, match="no room for acme@1"):
            await story.ask()
        assert 1.9 <= asyncio.get_running_loop().time() - began <= 2
        holder.release()

    in_simulated_time(work())


def test_a_load_that_takes_too_long_names_the_version() -> None:
    async def work() -> None:
        story = Story(timeout_s=2)
        story.loader.gate("acme@1")
        with pytest.raises(DeadlineExceeded, match=r"acme@1 was not loaded within 1\.9"):
            await story.ask()
        assert story.cache.loading == [("acme", 1)], "others may still wait for it"
        await story.cache.close(1)

    in_simulated_time(work())


async def test_an_architecture_that_is_not_installed_is_the_models_failure_and_nothing_is_decoded() -> None:
    story = Story()
    story.register(ACME, 7, architecture="not-installed-here")
    await story.heads.refresh(ACME)
    decoded: list[object] = []

    def decode(network: object) -> NDArray[np.float32]:
        decoded.append(network)
        return rows_of(1)

    with await story.enter("acme@2") as ticket:
        with pytest.raises(ModelFailed, match="acme@2 can't be served: its architecture is not installed"):
            await story.service.predict(ticket, decode)
    assert decoded == [] and story.loader.loads == []


async def test_a_tenant_that_is_not_known_waits_for_a_store_that_hangs_only_so_long() -> None:
    gate, hangs = threading.Event(), threading.Event()

    def before(operation: str, key: str) -> None:
        if hangs.is_set():
            assert gate.wait(10)

    store = FaultyStore(MemoryStore(), before=before)
    with ThreadPoolExecutor(1) as threads:
        story = Story(store=store, threads=threads, timeout_s=0.05)
        hangs.set()
        try:
            with pytest.raises(Unavailable, match=r"did not answer within 0\.05 s"):
                await story.enter()
            assert story.cold.ongoing == 0
        finally:
            gate.set()


async def test_nobody_is_let_in_for_a_suspended_tenant() -> None:
    story = Story()
    story.registry.tenancy.suspend(ACME)
    with pytest.raises(Suspended, match="acme is suspended"):
        await story.enter()
    assert (await story.ask("globex")).version.tenant == "globex"


async def test_a_request_counts_as_under_way_until_its_ticket_ends_and_a_line_of_a_stream_does_not() -> None:
    story = Story()
    await story.limit(concurrent_requests=1, requests_per_s=1, burst=3)
    with await story.enter() as stream:
        with pytest.raises(TooManyAtOnce):
            await story.enter()
        for _ in range(2):
            with await story.enter(within=stream):
                pass
        with pytest.raises(TooManyRequests):  # its lines count for the rate
            await story.enter(within=stream)
    story.clock.advance(1)
    with await story.enter():
        pass


async def test_what_a_ref_means_is_told_without_a_load() -> None:
    story = Story()
    with await story.enter() as ticket:
        assert (await story.service.describe(ticket)).name == "acme@1"
    assert story.loader.loads == []


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
async def test_labels_are_the_likeliest_classes_however_many_rows_there_are(rows: int) -> None:
    logits = np.random.default_rng(rows).normal(size=(rows, 10)).astype(np.float32)
    version = (await Story().ask()).version
    wanted = [int(np.argmax(row)) for row in logits]
    found = Prediction(logits, version, Tier.DEVICE)
    assert (found.label_list(), found.labels.tolist()) == (wanted, wanted)


async def test_who_may_not_is_not_let_in_before_anything_is_looked_up() -> None:
    class Nobody:
        background = False

        def may_predict(self, ref: ModelRef) -> None:
            raise NotFound("not yours")

    story = Story()
    with pytest.raises(NotFound, match="not yours"):
        await story.service.enter(Nobody(), ModelRef.parse("acme"))
    assert story.heads.last_head(ACME) is None


async def test_promise_11_what_is_known_needs_none_of_the_places_of_those_who_wait_for_the_store() -> None:
    story = Story(cold=FairSemaphore(1, 0))
    await story.ask()
    async with story.cold.hold(1):
        assert (await story.ask()).tier is Tier.DEVICE
        with pytest.raises(Overloaded):
            await story.enter("globex")
    await story.enter("globex")


async def test_promise_10_the_old_version_answers_while_the_promoted_one_loads() -> None:
    story = Story()
    await story.ask()
    two = story.register(ACME, 22)
    story.registry.set_alias(ACME, PRODUCTION, two)
    gate = story.loader.gate(f"acme@{two}")
    old, new = story.heads.last_head(ACME), await story.heads.refresh(ACME)
    story.swaps.moved(old, new)
    await settle()
    for _ in range(3):
        answer = await story.ask()
        assert (answer.version.version, answer.tier) == (1, Tier.DEVICE)
    gate.set()
    await story.swaps.settled("acme", 5)
    answer = await story.ask()
    assert (answer.version.version, answer.tier) == (two, Tier.DEVICE)
