"""Fetch, check, build: what happens to bytes on their way from the store to a model."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from flatshare.device.cpu import CpuDevice
from flatshare.device.cuda import CudaDevice
from flatshare.device.opening import CONTEXT_BYTES, device_budget
from flatshare.device.protocol import Device, K
from flatshare.device.testing.simulated_cuda import SimulatedCuda
from flatshare.device.torch_cuda import TorchCuda
from flatshare.engine.inference import Inference
from flatshare.errors import ModelFailed, NoRoom, ProbeFailed
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.models.stages import Model
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.weights import fetch as fetch_module
from flatshare.weights.device_loader import DeviceLoader
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare.weights.tiers import ModelKey, Part, Tier
from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import ByteRange, Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore
from flatshare_registry.testing.files import encode_safetensors
from flatshare_registry.weights import TensorSpec

NETWORK = architecture("mnist-cnn")
ROWS = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


class CountingStore(MemoryStore):
    """Notes every GET of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gets: list[tuple[str, ByteRange | None]] = []

    def get(self, key: str, byte_range: ByteRange | None = None):  # type: ignore[no-untyped-def]  # as the base
        if key.startswith("blobs/"):
            self.gets.append((key, byte_range))
        return super().get(key, byte_range)


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(NETWORK.build().state_dict())


def register(store: MemoryStore, tenant: str, tensors: dict[str, torch.Tensor]) -> VersionRecord:
    registry = Registry(store)
    registry.create_tenant(TenantId(tenant))
    return registry.register(
        TenantId(tenant), save(tensors), NETWORK.name, NETWORK.tensors,
        probe=lambda weights: probe_logits(NETWORK, weights),
    ).version  # fmt: skip


def right(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    module = NETWORK.build()
    module.load_state_dict(tensors)
    with torch.inference_mode():
        logits: torch.Tensor = module(ROWS)
        return logits


def logits(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        return model(ROWS.to(DEVICE.torch_device)).cpu()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


@pytest.fixture
def record(store: CountingStore) -> VersionRecord:
    return register(store, "acme", state(1))


async def load(loader: DeviceLoader, record: VersionRecord) -> tuple[Model, Tier]:
    loader.check(record)
    held = loader.hold(record)
    prepared = await loader.prepare_local(record, held) or await loader.prepare(record, held, 10)
    return (await loader.place(record, prepared, held)).model, prepared.tier


def simulated() -> CudaDevice:
    return CudaDevice(SimulatedCuda(), chunk_bytes=1_000_000)


DEVICES = [CpuDevice, simulated, *([lambda: CudaDevice(TorchCuda())] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES, ids=["cpu", "simulated", "cuda"][: len(DEVICES)], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Where :func:`loader_of` loads to: the device is the only difference."""
    made: Device = request.param()
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", made)
    yield made
    if isinstance(made, CudaDevice) and isinstance(made.runtime, SimulatedCuda):
        assert made.runtime.violations == []


DEVICE: Device = CpuDevice()


def loader_of(source: TensorSource, threads: ThreadPoolExecutor) -> DeviceLoader:
    return DeviceLoader(source, DEVICE, threads, threads)


@pytest.mark.parametrize("with_tier", [False, True])
async def test_a_model_is_loaded_and_answers_rightly(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, tmp_path: Path, with_tier: bool
) -> None:
    tier = HostTier(tmp_path / "tier", 10**9) if with_tier else None
    loader = loader_of(TensorSource(store, tier), threads)
    model, came_from = await load(loader, record)
    assert came_from == Tier.STORE
    assert store.gets == [
        (layout.blob_key(record.digest), ByteRange(record.tensors[0].start, record.size_bytes))
    ]
    torch.testing.assert_close(logits(model), right(state(1)), rtol=1e-5, atol=1e-5)


async def test_a_second_replica_finds_it_on_the_node(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    kept = [
        await load(loader_of(TensorSource(store, HostTier(tmp_path, 10**9)), threads), record) for _ in "ab"
    ]
    assert [tier for _, tier in kept] == [Tier.STORE, Tier.HOST]
    assert len(store.gets) == 1
    torch.testing.assert_close(logits(kept[1][0]), right(state(1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_tier", [False, True])
async def test_promise_12_every_flipped_bit_of_a_tensor_is_found(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, tmp_path: Path, with_tier: bool
) -> None:
    key = layout.blob_key(record.digest)
    weights = store.get(key).data
    ends = [one.start for one in record.tensors] + [one.end - 1 for one in record.tensors]
    for number, position in enumerate((*ends, len(weights) // 2)):
        tier = HostTier(tmp_path / str(number), 10**9) if with_tier else None
        loader = loader_of(TensorSource(store, tier), threads)
        damaged = bytearray(weights)
        damaged[position] ^= 1
        store.put(key, bytes(damaged), Overwrite())
        with pytest.raises(Corrupt, match="sha256"):
            await load(loader, record)
        if tier is not None:  # what was whole is published, the damaged one is not, and nothing is left over
            kept = {one.sha256: one.size_bytes for one in record.tensors if one.sha256 in tier.digests()}
            assert {one.sha256 for one in record.tensors if one.start <= position < one.end}.isdisjoint(kept)
            assert tier.usage().used_bytes == sum(-(-size // 4096) * 4096 for size in kept.values())
    store.put(key, weights[:-1], Overwrite())
    with pytest.raises(Corrupt):
        await load(loader, record)
    store.delete(key)
    with pytest.raises(Corrupt, match="gone"):
        await load(loader, record)


async def test_a_header_that_was_changed_does_not_matter_because_nobody_reads_it(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    key = layout.blob_key(record.digest)
    damaged = bytearray(store.get(key).data)
    damaged[0] ^= 1
    store.put(key, bytes(damaged), Overwrite())
    model, _ = await load(loader_of(TensorSource(store), threads), record)
    torch.testing.assert_close(logits(model), right(state(1)), rtol=1e-5, atol=1e-5)


async def test_a_record_that_lies_about_byte_ranges_is_corrupt(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    first, second = record.tensors[:2]
    lying = record.model_copy(
        update={
            "tensors": (
                first.model_copy(update={"start": second.start, "end": second.start + first.size_bytes}),
                *record.tensors[1:],
            )
        }
    )
    with pytest.raises(Corrupt, match="sha256"):
        await load(loader_of(TensorSource(store), threads), lying)


async def test_only_missing_byte_ranges_are_fetched(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    own_head = state(1) | {name: tensor + 1 for name, tensor in state(1).items() if name.startswith("fc2")}
    sibling = register(store, "globex", own_head)
    source = TensorSource(store, HostTier(tmp_path, 10**9))
    loader = loader_of(source, threads)
    first, _ = await load(loader, record)
    store.gets.clear()
    before = source.fetched_bytes
    second, came_from = await load(loader, sibling)
    own = [one for one in sibling.tensors if one.name.startswith("fc2")]
    assert came_from == Tier.STORE
    assert source.fetched_bytes - before == sum(one.size_bytes for one in own) < 6000
    assert all(part is not None for _, part in store.gets)
    torch.testing.assert_close(logits(second), right(own_head), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(first), right(state(1)), rtol=1e-5, atol=1e-5)
    assert [a is b for a, b in zip(first.stages, second.stages, strict=True)] == [True, True, True, False]


async def test_what_nobody_holds_any_more_is_freed(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    loader = loader_of(TensorSource(store), threads)
    model, _ = await load(loader, record)
    assert len(loader.hold(record)) == len(record.tensors)
    gc.disable()  # it must not take the cycle collector
    try:
        del model
        assert loader.hold(record) == {}
    finally:
        gc.enable()


async def test_what_a_failed_load_had_is_freed_too(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    loader = loader_of(TensorSource(store), threads)
    cache = ModelCache(ledger=Ledger(2, None), loader=loader)
    assert record.probe_logits is not None
    wrong = record.model_copy(update={"probe_logits": tuple(v + 0.5 for v in record.probe_logits)})
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ModelFailed, match="probe"):
            await cache.lease(wrong, 5)
        assert loader.hold(record) == {}
    finally:
        gc.enable()


async def test_a_pass_and_a_failed_pass_leave_nothing_behind(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    loader = loader_of(TensorSource(store), threads)
    cache = ModelCache(ledger=Ledger(2, None), loader=loader)
    inference = Inference(DEVICE)
    gc.collect()
    gc.disable()
    try:
        for good in (True, False):
            with await cache.lease(record, 5) as lease:
                if good:
                    await inference.run(lease, ROWS.numpy())
                else:
                    with pytest.raises(ModelFailed):
                        await inference.run(lease, ROWS.numpy()[:, :, :5, :5])
            await asyncio.sleep(0)
            cache.unload(ModelKey.of(record))
            for _ in range(3000):  # the thread lets go of its batch just after it has answered
                if not loader.hold(record):
                    break
                await asyncio.sleep(0.01)
            assert (loader.hold(record), cache.ledger.held_bytes) == ({}, 0)
    finally:
        gc.enable()
        inference.close()


async def test_a_small_tensor_does_not_keep_the_part_it_came_in(
    store: CountingStore, record: VersionRecord
) -> None:
    fetched = TensorSource(store).read(record, [one.name for one in record.tensors], 5)
    kept = {one.name: fetched.data[one.sha256].nbytes for one in record.tensors}
    bases = {id(fetched.data[one.sha256].obj): one.name for one in record.tensors}
    assert kept["fc1.weight"] == 4_718_592
    assert len(bases) == len(record.tensors), "no two share the memory of one answer"


def test_a_large_download_holds_a_few_parts_at_a_time(
    store: CountingStore, record: VersionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "RANGE_BYTES", 100_000)
    ahead = []
    with ThreadPoolExecutor(2) as parts:
        source = TensorSource(store, None, parts)
        ranges = fetch_module._ranges(sorted(record.tensors, key=lambda one: one.start))
        for number, _ in enumerate(source._read_ranges(record, ranges, time.monotonic() + 60)):
            while not number and len(store.gets) < 2:
                time.sleep(
                    0.001
                )  # what comes next is on its way: the test's own time-out says where it is not
            ahead.append(len(store.gets) - number - 1)
    assert len(ranges) == 48
    assert 1 <= max(ahead) <= fetch_module.RANGES_AHEAD


async def test_large_weights_come_in_parts_and_tensors_span_them(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(fetch_module, "RANGE_BYTES", 1_000_003)
    for tier in (None, HostTier(tmp_path / "tier", 10**9)):
        store.gets.clear()
        with ThreadPoolExecutor(3) as parts:
            model, _ = await load(loader_of(TensorSource(store, tier, parts), threads), record)
        assert len(store.gets) == 5
        torch.testing.assert_close(logits(model), right(state(1)), rtol=1e-5, atol=1e-5)
        del model


async def test_a_cut_answer_is_asked_for_again_and_a_dead_store_is_unavailable(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    failures = 1

    def flaky(operation: str, key: str) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise Unavailable("cut")

    loader = loader_of(TensorSource(FaultyStore(store, before=flaky)), threads)
    await load(loader, record)
    failures = 100
    with pytest.raises(Unavailable, match="cut"):
        await load(loader, register(store, "other", state(9)))


async def test_without_room_in_the_tier_the_bytes_stay_in_memory(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    tier = HostTier(tmp_path / "tier", 100_000)  # conv layers fit, fc1 does not
    model, _ = await load(loader_of(TensorSource(store, tier), threads), record)
    assert tier.usage().bypassed == 1
    assert tier.usage().used_bytes <= 100_000
    torch.testing.assert_close(logits(model), right(state(1)), rtol=1e-5, atol=1e-5)


async def test_a_model_that_does_not_answer_its_probe_is_never_served(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    loader = loader_of(TensorSource(store), threads)
    assert record.probe_logits is not None
    wrong = record.model_copy(update={"probe_logits": tuple(v + 0.5 for v in record.probe_logits)})
    with pytest.raises(ModelFailed, match="does not answer its probe"):
        await load(loader, wrong)
    # The same with right logits and tensors that were mixed up on the way: two biases of equal shape.
    mixed = state(1)
    mixed["conv1.bias"] = mixed["conv1.bias"] + 1
    other = register(store, "mixed", mixed)
    with pytest.raises(ModelFailed, match="does not answer its probe"):
        await load(loader, other.model_copy(update={"probe_logits": record.probe_logits}))
    await load(loader, record.model_copy(update={"probe_logits": None}))  # registered without torch


async def test_promise_2_a_model_that_fails_its_probe_evicts_nothing_on_any_device(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    cache = ModelCache(
        ledger=Ledger(1, None), loader=loader_of(TensorSource(store, HostTier(tmp_path, 10**9)), threads)
    )
    (await cache.lease(record, 5)).release()
    other = register(store, "globex", state(2))
    wrong = other.model_copy(update={"probe_logits": record.probe_logits})
    with pytest.raises(ProbeFailed):
        await cache.lease(wrong, 5)
    assert cache.stats.evictions == 0 and cache.is_resident(ModelKey.of(record))


async def test_promise_11_the_nodes_files_are_served_while_the_store_has_all_threads(
    store: CountingStore, record: VersionRecord, tmp_path: Path
) -> None:
    hang = threading.Event()
    with ThreadPoolExecutor(2) as stuck, ThreadPoolExecutor(2) as local:
        loader = DeviceLoader(TensorSource(store, HostTier(tmp_path, 10**9)), DEVICE, stuck, local)
        cache = ModelCache(ledger=Ledger(4, None), loader=loader)
        (await cache.lease(record, 5)).release()
        cache.unload(ModelKey.of(record))
        loader.let_go()
        waiting = [stuck.submit(hang.wait, 20) for _ in range(4)]
        try:
            with await cache.lease(record, 5) as lease:
                assert lease.tier is Tier.HOST
        finally:
            hang.set()
        assert all(one.result() for one in waiting)


async def test_what_is_not_on_the_node_waits_for_none_of_its_threads(
    store: CountingStore, record: VersionRecord, tmp_path: Path
) -> None:
    hang = threading.Event()
    with ThreadPoolExecutor(2) as fetching, ThreadPoolExecutor(1) as stuck:
        loader = DeviceLoader(TensorSource(store, HostTier(tmp_path, 10**9)), DEVICE, fetching, stuck)
        cache = ModelCache(ledger=Ledger(4, None), loader=loader)
        waiting = stuck.submit(hang.wait, 20)
        try:
            with await cache.lease(record, 5) as lease:
                assert lease.tier is Tier.STORE
        finally:
            hang.set()
        assert waiting.result()


async def test_a_file_that_went_bad_on_the_node_is_found_and_removed(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    tier = HostTier(tmp_path, 10**9)
    await load(loader_of(TensorSource(store, tier), threads), record)
    gc.collect()
    damaged = max(record.tensors, key=lambda one: one.size_bytes).sha256
    os.chmod(tier.path(damaged), 0o600)
    with tier.path(damaged).open("r+b") as file:
        file.write(bytes(1_000_000))
    with pytest.raises(ProbeFailed):  # a process that has not seen it yet
        await load(loader_of(TensorSource(store, tier), threads), record)
    assert damaged not in tier.digests()
    model, came_from = await load(loader_of(TensorSource(store, tier), threads), record)
    assert came_from is Tier.STORE
    torch.testing.assert_close(logits(model), right(state(1)), rtol=1e-5, atol=1e-5)


def test_promise_5_versions_that_overlap_fetch_what_they_share_once(tmp_path: Path) -> None:
    """Each also has a larger tensor of its own: the locks that they take first are different ones."""
    store = MemoryStore()
    random = np.random.default_rng(0)
    shared = random.random(300_000, dtype=np.float32)
    registry = Registry(store)
    records = []
    for tenant in ("acme", "globex"):
        arrays = {"own": random.random(400_000, dtype=np.float32), "shared": shared}
        specs = {name: TensorSpec("F32", array.shape) for name, array in arrays.items()}
        registry.create_tenant(TenantId(tenant))
        records.append(registry.register(TenantId(tenant), encode_safetensors(arrays), "x", specs).version)
    sources = [TensorSource(store, HostTier(tmp_path, 10**8)) for _ in range(6)]
    barrier = threading.Barrier(len(sources))

    def read(number: int) -> None:
        barrier.wait(10)
        sources[number].read(records[number % 2], {"own", "shared"}, 30)

    with ThreadPoolExecutor(len(sources)) as threads:
        list(threads.map(read, range(len(sources))))
    unique = {one.sha256: one.size_bytes for record in records for one in record.tensors}
    assert sum(source.fetched_bytes for source in sources) == sum(unique.values())


async def test_a_model_that_goes_wrong_while_the_replica_stops_is_no_other_error(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    """Its files are not looked at any more, but nothing that this process kept of it is used again."""
    over = ThreadPoolExecutor(1)
    loader = DeviceLoader(TensorSource(store), DEVICE, over, threads)
    first, _ = await load(loader_of(TensorSource(store), threads), record)
    model, _ = await load(loader, record)
    assert model.digest == first.digest == record.digest
    del model
    over.shutdown()
    loader.distrust(record)
    assert loader.hold(record) == {}


async def test_a_device_that_is_out_of_memory_is_no_fault_of_the_model(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor
) -> None:
    class FullDevice(CpuDevice):
        computes_in_host_memory = False

        def place(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    loader = DeviceLoader(TensorSource(store), FullDevice(), threads, threads)
    cache = ModelCache(ledger=Ledger(2, None), loader=loader)
    with pytest.raises(NoRoom, match="no memory for a model, and holds none"):
        await cache.lease(record, 5)
    assert (cache.occupied, cache.ledger.held_bytes, cache.ledger.reserved_bytes) == (0, 0, 0)
    loader.device = CpuDevice()
    (await cache.lease(record, 5)).release()  # not remembered: a moment later there may be room


@pytest.mark.parametrize("name", ["gone", "mnist-resnet18"])
async def test_an_architecture_that_is_not_installed_or_changed_is_refused(
    store: CountingStore, record: VersionRecord, threads: ThreadPoolExecutor, name: str
) -> None:
    with pytest.raises(ModelFailed, match="can't be served here"):
        loader_of(TensorSource(store), threads).check(record.model_copy(update={"architecture": name}))


def test_the_budget_of_a_device() -> None:
    from flatshare.device.memory import DeviceMemory
    from flatshare.errors import SettingsError

    class Gpu(CpuDevice):
        def memory(self) -> DeviceMemory:
            return DeviceMemory(allocated=0, free=60 * gib, total=100 * gib)

    gib = 1024**3
    assert device_budget(CpuDevice(), 0, 10, 1.0) is None
    assert device_budget(CpuDevice(), 77, 10, 1.0) == 77
    assert device_budget(Gpu(), 0, 10 * gib, 1.0) == 50 * gib
    assert device_budget(Gpu(), 0, 10 * gib, 0.25) == 15 * gib
    assert device_budget(Gpu(), 0, 0, 0.25) == 25 * gib - CONTEXT_BYTES, "what the allocator itself may take"
    with pytest.raises(SettingsError, match="leaves nothing"):
        device_budget(Gpu(), 0, 25 * gib, 0.25)


async def test_scrubbing_a_model_leaves_those_alone_that_share_with_it(
    store: CountingStore, threads: ThreadPoolExecutor
) -> None:
    base, own = state(1), state(2)
    acme = register(store, "acme", base)
    globex = register(store, "globex", {**base, "fc2.weight": own["fc2.weight"], "fc2.bias": own["fc2.bias"]})
    loader = DeviceLoader(TensorSource(store), DEVICE, threads, threads)
    cache = ModelCache(ledger=Ledger(4, None), loader=loader)
    lease = await cache.lease(acme, 5)
    (await cache.lease(globex, 5)).release()
    part = {one.name: Part(one.sha256, one.dtype, one.shape) for one in acme.tensors}
    convolution = lease.model.tensors[part["conv2.weight"]]
    cache.erase("acme")
    lease.release()
    assert convolution.abs().sum() > 0, "globex has it too"
    other = await cache.lease(globex, 5)
    rows = torch.rand(3, 1, 28, 28)
    there = rows.to(DEVICE.torch_device)
    wanted = NETWORK.build()
    wanted.load_state_dict({**base, "fc2.weight": own["fc2.weight"], "fc2.bias": own["fc2.bias"]})
    with torch.inference_mode():
        torch.testing.assert_close(other.model(there).cpu(), wanted(rows), rtol=1e-5, atol=1e-5)
    alone = other.model.tensors[part["conv2.weight"]]
    told = cache.erase("globex")
    other.release()
    assert alone.abs().sum() == 0, "torch's own memory is overwritten"
    assert told.overwritten_bytes >= alone.nbytes
    # Who loads the same tensors later gets them from the store, not the zeros.
    again = register(store, "initech", base)
    with torch.inference_mode(), await cache.lease(again, 5) as loaded:
        assert loaded.model.tensors[part["conv2.weight"]].abs().sum() > 0


def test_views_of_files_are_never_written(store: CountingStore, tmp_path: Path) -> None:
    device = CpuDevice()
    mapped = torch.frombuffer(bytearray(b"1234"), dtype=torch.uint8)
    own = torch.ones(4)
    assert device.scrub([mapped, own]) == own.nbytes
    assert (mapped.tolist(), own.tolist()) == ([49, 50, 51, 52], [0.0] * 4)


async def test_an_erased_tenants_tensors_are_not_kept_ready(
    store: CountingStore, record: VersionRecord, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    tier = HostTier(tmp_path / "tier", 10**9)
    loader = DeviceLoader(TensorSource(store, tier), DEVICE, threads, threads)
    cache = ModelCache(ledger=Ledger(4, None), loader=loader)
    (await cache.lease(record, 5)).release()
    cache.unload(ModelKey.of(record))  # not resident any more, but warm
    gc.collect()
    assert cache.erase("acme").models == 0
    assert await cache.erased("acme", 5)
    gc.collect()
    done = tier.scrub([one.sha256 for one in record.tensors])
    assert (done.kept, tier.digests()) == ((), [])
