"""The forward pass: right logits, receipts, and leases that outlive a caller who goes away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from flatshare.device.cpu import CpuDevice
from flatshare.engine.inference import MAX_BATCH_ROWS, Inference
from flatshare.engine.stacked import Stacks
from flatshare.errors import IsolationBroken, ModelFailed, NoRoom
from flatshare.models.architecture import architecture
from flatshare.models.stages import Model
from flatshare.residency.lease import Lease
from flatshare.weights.tiers import LeaseTag

from .one_model import Gate, cache_of, record_of


class Broken(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")


RECORD = record_of("x")
ROWS = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)


async def test_rows_come_back_as_logits(inference: Inference) -> None:
    with await cache_of(nn.Flatten()).lease(RECORD, 5) as lease:
        logits = await inference.run(lease, ROWS)
    np.testing.assert_array_equal(logits, ROWS.reshape(2, 4))


async def test_a_pass_that_raises_is_a_failed_model(inference: Inference) -> None:
    with await cache_of(Broken()).lease(RECORD, 5) as lease, pytest.raises(ModelFailed, match="acme@1"):
        await inference.run(lease, ROWS)


def another_receipt(lease: Lease) -> None:
    assert lease._resident is not None
    lease._resident.tag = LeaseTag("globex", 1, "1" * 64, 99)


def another_model(lease: Lease) -> None:
    assert lease._resident is not None
    lease._resident.model = Model((nn.Flatten(),), digest=RECORD.digest)


def other_weights(lease: Lease) -> None:
    assert lease._resident is not None and lease._resident.model is not None
    object.__setattr__(lease._resident.model, "digest", "1" * 64)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [another_receipt, another_model, other_weights])
async def test_promise_1_a_slot_that_changed_fails_the_request(
    inference: Inference, when: str, change: Callable[[Lease], None]
) -> None:
    module = Gate()
    with await cache_of(module).lease(RECORD, 5) as lease:
        if when == "before":
            change(lease)
            module.go.set()
        running = asyncio.create_task(inference.run(lease, ROWS))
        if when == "after":
            await asyncio.to_thread(module.entered.wait, 5)
            change(lease)
            module.go.set()
        with pytest.raises(IsolationBroken, match=when):
            await running


async def test_promise_1_a_model_of_other_weights_never_becomes_resident() -> None:
    cache = cache_of(nn.Flatten(), digest="1" * 64)
    with pytest.raises(IsolationBroken, match="acme@1"):
        await cache.lease(RECORD, 5)
    assert cache.snapshot() == [] and cache.occupied == 0


async def test_promise_3_a_caller_that_goes_away_keeps_its_lease_while_the_pass_runs(
    inference: Inference,
) -> None:
    module = Gate()
    cache = cache_of(module)

    async def request() -> None:
        with await cache.lease(RECORD, 5) as lease:
            await inference.run(lease, ROWS)

    running = asyncio.create_task(request())
    await asyncio.to_thread(module.entered.wait, 5)
    running.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert cache.snapshot()[0].leases == 1, "the lease ended while its model was running"
    module.go.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert cache.snapshot()[0].leases == 0


async def test_the_event_loop_goes_on_while_a_pass_runs(inference: Inference) -> None:
    module = Gate()
    with await cache_of(module).lease(RECORD, 5) as lease:
        running = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        assert not running.done()
        await asyncio.sleep(0.05)  # the pass takes this long at least
        module.go.set()
        await running
    assert 0.05 <= inference.busy_s < 5


class Counting(nn.Module):
    """A gate that notes how many rows each pass had, and marks its answers."""

    def __init__(self, mark: float) -> None:
        super().__init__()
        self.mark, self.sizes = mark, []
        self.entered, self.go = threading.Event(), threading.Event()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(rows))
        self.entered.set()
        assert self.go.wait(10)
        return rows.flatten(1) + self.mark


async def leased(module: nn.Module, tenant: str) -> Lease:
    return await cache_of(module).lease(RECORD.model_copy(update={"tenant": tenant}), 5)


async def test_requests_that_arrive_while_a_pass_runs_form_the_next(inference: Inference) -> None:
    module = Counting(0)
    with await leased(module, "acme") as lease:
        first = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        inputs = [ROWS[:1] + n for n in range(5)]
        later = [asyncio.create_task(inference.run(lease, rows)) for rows in inputs]
        await asyncio.sleep(0)
        module.go.set()
        await first
        answers = await asyncio.gather(*later)
    assert module.sizes == [2, 5]
    for rows, logits in zip(inputs, answers, strict=True):
        np.testing.assert_array_equal(logits, rows.reshape(1, 4))


async def test_promise_1_models_are_never_mixed_in_a_pass(inference: Inference) -> None:
    one, two = Counting(100), Counting(200)
    with await leased(one, "acme") as a, await leased(two, "globex") as b:
        first = asyncio.create_task(inference.run(a, ROWS))
        await asyncio.to_thread(one.entered.wait, 5)
        later = [asyncio.create_task(inference.run((a, b)[n % 2], ROWS[:1])) for n in range(6)]
        await asyncio.sleep(0)
        one.go.set()
        two.go.set()
        await first
        answers = await asyncio.gather(*later)
    assert (one.sizes, two.sizes) == ([2, 3], [3])
    for number, logits in enumerate(answers):
        np.testing.assert_array_equal(logits, ROWS[:1].reshape(1, 4) + (100, 200)[number % 2])


@pytest.mark.parametrize(("meet", "passes"), [(False, 3), (True, 2)])
async def test_models_that_share_nothing_meet_in_a_pass_where_that_is_asked_for(
    meet: bool, passes: int
) -> None:
    inference = Inference(CpuDevice(), stacks=Stacks(architecture) if meet else None)
    one, two = Counting(100), Counting(200)
    with await leased(one, "acme") as a, await leased(two, "globex") as b:
        first = asyncio.create_task(inference.run(a, ROWS))
        await asyncio.to_thread(one.entered.wait, 5)
        later = [asyncio.create_task(inference.run((a, b)[n % 2], ROWS[:1] + n)) for n in range(6)]
        await asyncio.sleep(0)
        one.go.set()
        two.go.set()
        await first
        answers = await asyncio.gather(*later)
    assert inference.passes == passes
    assert (one.sizes, two.sizes) == ([2, 3], [3]), "each runs its own rows"
    for number, logits in enumerate(answers):
        wanted = (ROWS[:1] + number).reshape(1, 4) + (100, 200)[number % 2]
        np.testing.assert_array_equal(logits, wanted)
    inference.close()


class Head(nn.Module):
    def __init__(self, mark: float) -> None:
        super().__init__()
        self.mark = mark

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + self.mark


async def test_promise_1_models_that_share_layers_keep_their_own_heads(inference: Inference) -> None:
    base = Counting(0)
    marks = {"acme": 100.0, "globex": 200.0, "initech": 300.0}
    leases = {}
    for tenant, mark in marks.items():
        record = RECORD.model_copy(update={"tenant": tenant})
        leases[tenant] = await cache_of(base, Head(mark)).lease(record, 5)
    first = asyncio.create_task(inference.run(leases["acme"], ROWS))
    await asyncio.to_thread(base.entered.wait, 5)
    asked = [("globex", ROWS[:1]), ("acme", ROWS[1:]), ("initech", ROWS), ("globex", ROWS[1:])]
    later = [asyncio.create_task(inference.run(leases[tenant], rows)) for tenant, rows in asked]
    await asyncio.sleep(0)
    base.go.set()
    await first
    answers = await asyncio.gather(*later)
    assert base.sizes == [2, 5], "what they share ran once for all their rows"
    for (tenant, rows), logits in zip(asked, answers, strict=True):
        np.testing.assert_array_equal(logits, rows.reshape(len(rows), 4) + marks[tenant])
    for lease in leases.values():
        lease.release()


async def test_a_request_cancelled_in_the_queue_leaves_the_batch(inference: Inference) -> None:
    module = Counting(0)
    with await leased(module, "acme") as lease:
        first = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        later = [asyncio.create_task(inference.run(lease, ROWS[:1])) for _ in range(3)]
        await asyncio.sleep(0)
        later[1].cancel()
        await asyncio.gather(later[1], return_exceptions=True)
        module.go.set()
        await asyncio.gather(first, later[0], later[2])
    assert module.sizes == [2, 2]


class Picky(nn.Module):
    """Refuses a batch in which any row is all zeros, as a network of an operator's own may."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if (rows.flatten(1) == 0).all(dim=1).any():
            raise ValueError("a row of zeros")
        return rows.flatten(1)


async def test_one_bad_row_fails_only_itself(inference: Inference) -> None:
    gate, picky = Gate(), Picky()
    with await leased(gate, "globex") as other, await leased(picky, "acme") as lease:
        first = asyncio.create_task(inference.run(other, ROWS))
        await asyncio.to_thread(gate.entered.wait, 5)
        bodies = [ROWS[1:], np.zeros_like(ROWS[1:]), ROWS[1:] + 1]
        later = [asyncio.create_task(inference.run(lease, body)) for body in bodies]
        await asyncio.sleep(0)
        gate.go.set()
        await first
        good, bad, also_good = await asyncio.gather(*later, return_exceptions=True)
    assert isinstance(bad, ModelFailed)
    np.testing.assert_array_equal(good, bodies[0].reshape(1, 4))
    np.testing.assert_array_equal(also_good, bodies[2].reshape(1, 4))


async def test_closing_refuses_who_still_waits() -> None:
    inference = Inference(CpuDevice())
    module = Counting(0)
    with await leased(module, "acme") as lease:
        first = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        later = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.sleep(0)
        closing = threading.Thread(target=inference.close, daemon=True)
        closing.start()
        while not inference._closing:
            await asyncio.sleep(0)
        module.go.set()
        np.testing.assert_array_equal(await first, ROWS.reshape(2, 4))
        with pytest.raises(NoRoom, match="stopping"):
            await later
        closing.join()


async def test_a_large_request_goes_in_several_passes_and_others_have_their_turns(
    inference: Inference,
) -> None:
    module, other = Counting(0), Counting(100)
    big = np.arange(200 * 4, dtype=np.float32).reshape(200, 1, 2, 2)
    order: list[str] = []
    with await leased(module, "acme") as lease, await leased(other, "globex") as small:
        first = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        later = [
            asyncio.create_task(inference.run(lease, big), name="big"),
            asyncio.create_task(inference.run(small, ROWS), name="small"),
        ]
        for task in later:
            task.add_done_callback(lambda done: order.append(done.get_name()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        other.go.set()
        module.go.set()
        answers = await asyncio.gather(first, *later)
    assert max(module.sizes) <= MAX_BATCH_ROWS and sum(module.sizes) == 202
    assert order == ["small", "big"], "who asks for two rows does not wait for two hundred"
    np.testing.assert_array_equal(answers[1], big.reshape(200, 4))


async def test_a_large_request_that_is_cancelled_keeps_its_lease_until_its_pass_ends(
    inference: Inference,
) -> None:
    module = Gate()
    cache = cache_of(module)
    big = np.zeros((3 * MAX_BATCH_ROWS, 1, 2, 2), dtype=np.float32)

    async def request() -> None:
        with await cache.lease(RECORD, 5) as lease:
            await inference.run(lease, big)

    running = asyncio.create_task(request())
    await asyncio.to_thread(module.entered.wait, 5)
    running.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert cache.snapshot()[0].leases == 1, "the lease ended while its model was running"
    assert inference.waiting == 0, "its other parts left the queue"
    module.go.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert cache.snapshot()[0].leases == 0


class Exhausted(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


async def test_a_device_without_memory_is_no_fault_of_the_model(inference: Inference) -> None:
    with await leased(Exhausted(), "acme") as lease, pytest.raises(NoRoom, match="acme@1"):
        await inference.run(lease, ROWS)


async def test_a_failed_pass_fails_its_requests_and_the_next_one_runs(inference: Inference) -> None:
    with await leased(Broken(), "acme") as bad, await leased(nn.Flatten(), "globex") as good:
        results = await asyncio.gather(
            inference.run(bad, ROWS),
            inference.run(bad, ROWS),
            inference.run(good, ROWS),
            return_exceptions=True,
        )
    assert [type(one) for one in results[:2]] == [ModelFailed, ModelFailed]
    assert results[0] is not results[1]
    np.testing.assert_array_equal(results[2], ROWS.reshape(2, 4))
