"""A replica whose device fails, hangs, has no memory, or is erased from: on a simulated CUDA."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save

from flatshare.api.error_table import describe_error
from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.device.cuda import CudaDevice
from flatshare.device.testing.simulated_cuda import SimulatedCuda
from flatshare.engine import runner as runner_module
from flatshare.errors import DeviceBroken, NoRoom, ProbeFailed, ServeError, Wedged
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.replica import warm_up as warm_up_module
from flatshare.replica.build import Replica
from flatshare.replica.identity import ReplicaIdentity
from flatshare.settings import Settings
from flatshare.weights.tiers import ModelKey
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import NotFound
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.memory import MemoryStore

NETWORK = architecture("mnist-cnn")
TENANTS = ("acme", "globex", "initech")
MANY = (*TENANTS, "hooli", "umbrella", "stark")
ROWS = np.random.default_rng(0).random((3, 1, 28, 28), dtype=np.float32)
MIB = 1024**2


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(NETWORK.build().state_dict())


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    store = MemoryStore()
    registry = Registry(store)
    for seed, tenant in enumerate(MANY):
        registry.create_tenant(TenantId(tenant))
        registry.register(
            TenantId(tenant), save(weights(seed)), NETWORK.name, NETWORK.tensors,
            probe=lambda data: probe_logits(NETWORK, data),
        )  # fmt: skip
    return store


@dataclass
class World:
    runtime: SimulatedCuda
    device: CudaDevice
    replica: Replica

    async def ask(self, ref: str) -> list[int]:
        service = self.replica.service
        with await service.enter(LOCAL_OPERATOR, ModelRef.parse(ref)) as ticket:
            return (await service.predict(ticket, lambda network: ROWS)).label_list()


Make = Callable[..., World]


@pytest.fixture
async def made(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setattr(warm_up_module, "architecture_names", lambda: ["mnist-cnn"])
    worlds: list[World] = []

    def make(total: int = 1 << 32, store: MemoryStore = store, **given: object) -> World:
        runtime = SimulatedCuda(total)
        device = CudaDevice(runtime)
        settings = Settings(host_dir="off", device="auto", **given)  # type: ignore[arg-type]  # a test's settings
        replica = Replica.build(settings, store, identity=ReplicaIdentity("r1", "host", "n1"), device=device)
        worlds.append(World(runtime, device, replica))
        return worlds[-1]

    yield make
    for one in worlds:
        one.runtime.go_on()
        await one.replica.close()
        assert one.runtime.violations == []


def right(tenant: str) -> list[int]:
    module = NETWORK.build()
    module.load_state_dict(weights(MANY.index(tenant)))
    with torch.inference_mode():
        found: list[int] = module(torch.from_numpy(ROWS)).argmax(1).tolist()
    return found


async def test_it_answers_as_on_the_cpu_and_is_warm_before(made: Make) -> None:
    world = made(slots=2)
    world.replica.start()
    sizes = sorted({world.device.padded(rows) for rows in range(1, 65)})
    assert sizes == [1, 2, 4, 8, 16, 32, 64]
    launched = world.runtime.copies
    assert launched >= 2 * len(sizes), "a pass of each size"
    for tenant in (*TENANTS, *TENANTS):
        assert await world.ask(tenant) == right(tenant)
    assert world.replica.cache.stats.evictions > 0


async def test_a_lost_device_makes_the_replica_unhealthy_and_blames_no_version(made: Make) -> None:
    world = made(slots=4)
    assert await world.ask("acme") == right("acme")
    world.replica.check_health()
    world.runtime.break_down()
    errors: list[ServeError] = []
    for tenant in TENANTS:  # acme by its pass, the others by their loads
        with pytest.raises(ServeError) as caught:
            await world.ask(tenant)
        errors.append(caught.value)
    assert {type(error) for error in errors} == {DeviceBroken}
    told = describe_error(errors[0])
    assert (told.status, told.code, told.retry_after_s) == (503, "replica_device_failed", 1)
    with pytest.raises(DeviceBroken, match="is replaced"):
        world.replica.check_health()
    assert world.replica.cache._failures._kinds and all(
        not known for known in world.replica.cache._failures._kinds.values()
    ), "another replica, or this one's successor, loads them at once"


async def test_an_erasure_on_a_lost_device_is_not_clean_and_frees_the_slot(made: Make) -> None:
    world = made(slots=4)
    await world.ask("acme")
    world.runtime.break_down()
    with pytest.raises(DeviceBroken):
        await world.ask("acme")
    receipt = await world.replica.erase("acme")
    assert (receipt.device, receipt.models, receipt.overwritten_bytes, receipt.clean) == ("cuda", 1, 0, False)
    assert (world.replica.cache.occupied, world.replica.cache.ledger.held_bytes) == (0, 0)


async def test_an_erasure_waits_for_the_device_to_have_overwritten(made: Make) -> None:
    world = made(slots=1)
    await world.ask("acme")
    pattern = max((one for one in weights(0).values()), key=lambda one: one.numel()).numpy().tobytes()[:4096]
    assert pattern in world.runtime.contents()
    await world.ask("globex")  # which evicts it
    assert pattern not in world.runtime.contents(), "overwritten as it went"
    await world.ask("acme")
    world.runtime.hang()
    erasing = asyncio.create_task(world.replica.erase("acme"))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not erasing.done()
    world.runtime.go_on()
    receipt = await erasing
    assert receipt.clean and receipt.models == 1 and receipt.overwritten_bytes >= 4_000_000
    assert pattern not in world.runtime.contents()


async def test_requests_of_a_device_that_hangs_end_in_their_time(made: Make) -> None:
    world = made(slots=4, request_timeout_s=1.0)
    await world.ask("acme")
    world.runtime.hang()
    began = time.monotonic()
    found = await asyncio.gather(*(world.ask(tenant) for tenant in TENANTS), return_exceptions=True)
    assert time.monotonic() - began < 3
    assert all(isinstance(one, ServeError) for one in found), found
    assert {describe_error(one).status for one in found if isinstance(one, ServeError)} <= {503, 504}
    with pytest.raises(Wedged):
        world.replica.check_health()


async def test_a_device_with_less_memory_than_the_ledger_evicts_and_nobody_is_refused(made: Make) -> None:
    """Finding 2: the ledger has room for six, the device for four; once all later tenants got 503 for ever."""
    world = made(total=40 * MIB, slots=100, device_bytes=1 << 30)
    for _ in range(3):
        for tenant in MANY:
            assert await world.ask(tenant) == right(tenant)
    assert world.replica.cache.stats.evictions >= 5
    limit = world.replica.cache.ledger.limit_bytes
    assert limit is not None and limit < 1 << 30, "the ledger has learned"


async def test_a_device_that_others_have_filled_says_so_at_once(made: Make) -> None:
    world = made(total=200 * MIB, slots=100, device_bytes=1 << 30)
    world.runtime.allocator.others_bytes = 200 * MIB - world.runtime.allocator.reserved
    world.runtime.allocator.give_back()
    world.runtime.allocator.others_bytes = 200 * MIB - world.runtime.allocator.reserved
    began = time.monotonic()
    with pytest.raises(NoRoom, match="no memory"):
        await world.ask("acme")
    assert time.monotonic() - began < 5
    world.runtime.allocator.others_bytes = 0
    assert await world.ask("acme") == right("acme"), "nothing of it is remembered"


async def test_a_pass_without_memory_is_halved_and_each_is_answered(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = made(slots=4)
    await world.ask("acme")
    launch, sizes = world.device.launch, []

    def small(rows: list[np.ndarray], work: object) -> object:
        sizes.append(sum(map(len, rows)))
        if sizes[-1] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(rows, work)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(world.device, "launch", small)
    gate = asyncio.gather(*(world.ask("acme") for _ in range(12)))
    assert await gate == [right("acme")] * 12
    assert max(sizes) > 6, "they had met"
    assert world.replica.inference.memory_failures > 0
    failures = world.replica.inference.memory_failures
    assert await asyncio.gather(*(world.ask("acme") for _ in range(12))) == [right("acme")] * 12
    assert world.replica.inference.memory_failures == failures, "the next ones were smaller"
    monkeypatch.setattr(runner_module, "PASSES_BEFORE_MORE", 1)
    world.replica.inference._runner._raise_at = 0
    monkeypatch.setattr(world.device, "launch", launch)
    for _ in range(8):
        assert await world.ask("acme") == right("acme")
    assert world.replica.inference._runner.rows_now == world.replica.inference.max_rows


async def test_a_network_that_does_not_run_on_this_device_goes(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding 14: it answers on the CPU, and fails each pass here (``torch.arange(n)`` without a device)."""
    world = made(slots=4)
    launch = world.device.launch
    monkeypatch.setattr(
        world.device, "launch", lambda rows, work: launch(rows, lambda given: work([torch.cat([one, torch.ones(1, 1, 28, 28)]) for one in given]))
    )  # fmt: skip
    with pytest.raises(ProbeFailed, match="does not run on cuda"):
        await world.ask("acme")
    assert world.replica.cache.occupied == 0


@pytest.mark.parametrize("when", ["prepare", "place"])
async def test_what_a_load_shares_with_an_erased_model_is_overwritten_too(
    made: Make, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The load kept its tensors from being overwritten with the model, and came to nothing itself."""
    registry, acme = Registry(MemoryStore()), TenantId("acme")
    registry.create_tenant(acme)
    first = weights(0)
    last = list(first)[-1]
    for one in (first, {**first, last: first[last] + 1}):
        registry.register(
            acme, save(one), NETWORK.name, NETWORK.tensors, probe=lambda data: probe_logits(NETWORK, data)
        )
    world = made(slots=4, store=registry.store)
    await world.ask("acme@1")
    pattern = max(first.values(), key=lambda one: one.numel()).numpy().tobytes()[:4096]
    assert pattern in world.runtime.contents()
    entered, go = threading.Event(), threading.Event()
    where, name = (world.replica.cache._loader, "_prepare") if when == "prepare" else (world.device, "place")
    original = getattr(where, name)

    def held_up(*given: object) -> object:
        entered.set()
        assert go.wait(10)
        return original(*given)

    monkeypatch.setattr(where, name, held_up)
    loading = asyncio.create_task(world.ask("acme@2"))
    await asyncio.to_thread(entered.wait, 10)
    erasing = asyncio.create_task(world.replica.erase("acme"))
    while (
        world.replica.cache._loads._loads
        and not next(iter(world.replica.cache._loads._loads.values())).erased
    ):
        await asyncio.sleep(0)
    go.set()
    with pytest.raises((NotFound, ServeError)):
        await loading
    assert (await erasing).clean
    assert pattern not in world.runtime.contents()
    assert world.replica.cache.ledger.held_bytes == 0


async def test_what_a_load_could_not_overwrite_is_told_and_the_ledger_goes_on(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = made(slots=4)
    await world.ask("acme")
    place, scrub, entered, go = world.device.place, world.device.scrub, threading.Event(), threading.Event()

    def held_up(tensors: dict[object, torch.Tensor]) -> object:
        entered.set()
        assert go.wait(10)
        return place(tensors)

    def refused(tensors: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(world.device, "place", held_up)
    loading = asyncio.create_task(world.ask("globex"))
    await asyncio.to_thread(entered.wait, 10)
    monkeypatch.setattr(world.device, "scrub", refused)
    erasing = asyncio.create_task(world.replica.erase("globex"))
    while not next(iter(world.replica.cache._loads._loads.values())).erased:
        await asyncio.sleep(0)
    go.set()
    with pytest.raises((NotFound, ServeError)):
        await loading
    assert not (await erasing).clean
    assert world.replica.cache.occupied == 1, "acme's"
    monkeypatch.setattr(world.device, "scrub", scrub)


async def test_a_load_that_was_refused_goes_on_when_what_drained_is_gone(made: Make) -> None:
    """Nobody is left who could go, and the memory is there: it need not wait for its whole time."""
    world = made(slots=4, request_timeout_s=20.0)
    await world.ask("acme")
    (record,) = world.replica.cache.resident_records()
    lease = world.replica.cache.try_lease(record)
    assert lease is not None
    place, refused = world.device.place, threading.Event()

    def full(tensors: dict[object, torch.Tensor]) -> object:
        if world.replica.cache.ledger.held_bytes:
            refused.set()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return place(tensors)

    world.device.place = full  # type: ignore[method-assign,assignment]  # for this test
    world.replica.cache.unload(ModelKey.of(record))
    asking = asyncio.create_task(world.ask("globex"))
    await asyncio.to_thread(refused.wait, 10)
    began = time.monotonic()
    for _ in range(50):
        await asyncio.sleep(0)
    lease.release()
    assert await asking == right("globex")
    assert time.monotonic() - began < 10
