"""Each caller gets the logits of its own rows, whatever a network gives; probes are answered once; threads are set."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from torch import nn

from flatshare.device.cpu import CpuDevice
from flatshare.engine.inference import Inference
from flatshare.errors import ModelFailed, ProbeFailed
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_rows
from flatshare_registry.records import VersionRecord

from .one_model import Gate, cache_of, record_of

RECORD = record_of("mnist-cnn")
ROWS = np.random.default_rng(0).normal(size=(4, 1, 28, 28)).astype(np.float32)


class TenFirst(nn.Module):
    """The first ten pixels; notes how many rows each pass has, and how many threads."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.threads: list[int] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(rows))
        self.threads.append(torch.get_num_threads())
        return rows.flatten(1)[:, :10]


class Miscounts(Gate):
    """Gives a row more or less than it got, after the test has let it on."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits = super().forward(rows)[:, :10]
        return torch.cat([logits, logits[:1]]) if self.by > 0 else logits[: len(logits) - 1]


@pytest.mark.parametrize("by", [1, -1])
async def test_a_network_that_gives_another_number_of_rows_gives_nobody_anothers(
    inference: Inference, by: int
) -> None:
    stage = Miscounts(by)
    with await cache_of(stage).lease(RECORD, 5) as lease:
        first = asyncio.create_task(inference.run(lease, ROWS[:1]))
        await asyncio.to_thread(stage.entered.wait, 5)
        later = [asyncio.create_task(inference.run(lease, ROWS[start : start + 2])) for start in (0, 2)]
        await asyncio.sleep(0)
        stage.go.set()
        answers = await asyncio.gather(first, *later, return_exceptions=True)
    assert [type(one) for one in answers] == [ModelFailed] * 3
    assert all("acme@1 gave" in str(one) for one in answers)


async def test_callers_of_one_pass_get_the_logits_of_their_own_rows(inference: Inference) -> None:
    stage = TenFirst()
    with await cache_of(stage, proven=True).lease(RECORD, 5) as lease:
        answers = await asyncio.gather(*[inference.run(lease, ROWS[n : n + 1 + n % 2]) for n in range(3)])
    for number, logits in enumerate(answers):
        wanted = ROWS[number : number + 1 + number % 2].reshape(-1, 784)[:, :10]
        np.testing.assert_array_equal(logits, wanted)


def owing(stage: nn.Module) -> VersionRecord:
    """The record of a model whose probe's answer is right."""
    with torch.inference_mode():
        logits = stage(torch.from_numpy(probe_rows(architecture("mnist-cnn"))))[0]
    return RECORD.model_copy(update={"probe_logits": tuple(logits.tolist())})


async def test_a_probe_is_answered_once_and_its_row_is_nobodys(inference: Inference) -> None:
    stage = TenFirst()
    record = owing(stage)
    cache = cache_of(stage, proven=False)
    stage.sizes.clear()
    with await cache.lease(record, 5) as lease:
        for _ in range(3):
            logits = await inference.run(lease, ROWS[:2])
            np.testing.assert_array_equal(logits, ROWS[:2].reshape(2, 784)[:, :10])
    with await cache.lease(record, 5) as lease:
        await inference.run(lease, ROWS[:2])
    assert stage.sizes == [3, 2, 2, 2]


async def test_a_model_that_was_proven_or_never_had_a_probe_is_not_asked_it(inference: Inference) -> None:
    for record, proven in ((owing(TenFirst()), True), (RECORD, False)):
        stage = TenFirst()
        with await cache_of(stage, proven=proven).lease(record, 5) as lease:
            await inference.run(lease, ROWS[:2])
        assert stage.sizes == [2]


async def test_a_probe_that_is_answered_wrongly_fails_the_rows_beside_it(inference: Inference) -> None:
    stage = TenFirst()
    record = RECORD.model_copy(update={"probe_logits": (9.0,) * 10})
    with await cache_of(stage, proven=False).lease(record, 5) as lease:
        for _ in range(2):
            with pytest.raises(ProbeFailed, match="acme@1"):
                await inference.run(lease, ROWS[:2])


@pytest.mark.parametrize(("setting", "of_network", "wanted"), [(0, 2, 2), (0, 1, 1), (3, 1, 3), (1, 2, 1)])
async def test_a_pass_has_the_threads_that_the_operator_says_or_else_the_network(
    setting: int, of_network: int, wanted: int
) -> None:
    inference = Inference(CpuDevice(), torch_threads=setting)
    stage = TenFirst()
    try:
        with await cache_of(stage, threads=of_network).lease(RECORD, 5) as lease:
            await inference.run(lease, ROWS)
            await inference.run(lease, ROWS)
    finally:
        inference.close()
    assert stage.threads == [wanted, wanted]


async def test_networks_in_turn_have_the_threads_of_each(inference: Inference) -> None:
    stages = {1: TenFirst(), 2: TenFirst()}
    caches = {threads: cache_of(stage, threads=threads) for threads, stage in stages.items()}
    for threads in (1, 2, 1, 2):
        with await caches[threads].lease(RECORD, 5) as lease:
            await inference.run(lease, ROWS)
    assert {threads: stage.threads for threads, stage in stages.items()} == {1: [1, 1], 2: [2, 2]}


async def test_passes_and_their_rows_are_counted_once(inference: Inference) -> None:
    with await cache_of(TenFirst()).lease(RECORD, 5) as lease:
        await inference.run(lease, ROWS)
        await inference.run(lease, ROWS[:1])
    assert (inference.passes, inference.rows, inference.waiting) == (2, 5, 0)


@pytest.mark.parametrize(("rows", "passes"), [(4, 1), (5, 2), (8, 2), (9, 3)])
async def test_a_request_is_cut_only_where_it_is_larger_than_a_pass(rows: int, passes: int) -> None:
    inference = Inference(CpuDevice(), max_batch_rows=4)
    stage = TenFirst()
    many = np.arange(rows * 784, dtype=np.float32).reshape(rows, 1, 28, 28)
    try:
        with await cache_of(stage).lease(RECORD, 5) as lease:
            logits = await inference.run(lease, many)
    finally:
        inference.close()
    np.testing.assert_array_equal(logits, many.reshape(rows, 784)[:, :10])
    assert (len(stage.sizes), max(stage.sizes)) == (passes, 4)


async def test_a_large_request_lets_its_own_tenants_small_ones_in_between() -> None:
    network, inference = TenFirst(), Inference(CpuDevice(), max_batch_rows=8)
    cache = cache_of(network)
    try:
        with await cache.lease(RECORD, 5) as one, await cache.lease(RECORD, 5) as other:
            large = asyncio.create_task(inference.run(one, np.zeros((8 * 50, 1, 28, 28), np.float32)))
            while len(network.sizes) < 3:
                await asyncio.sleep(0)
            await inference.run(other, ROWS[:1])
            done_after = len(network.sizes)
            assert (await large).shape == (400, 10)
    finally:
        inference.close()
    assert done_after < 20, "it did not wait for all fifty passes"
    assert network.sizes.count(8) == 50
