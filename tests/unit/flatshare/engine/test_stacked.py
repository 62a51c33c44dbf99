"""Models that share nothing in one pass with their weights stacked: the same logits as alone, and nothing kept."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.device.cpu import CpuDevice
from flatshare.device.cuda import CudaDevice
from flatshare.device.protocol import Device
from flatshare.device.testing.simulated_cuda import SimulatedCuda
from flatshare.engine import stacked
from flatshare.engine.passes import forward
from flatshare.engine.stacked import MOST_MODELS, Stacks
from flatshare.errors import ProbeFailed
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.models.stages import Model, device_tensor, plan_of
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.memory import MemoryStore


class Tenants:
    """Models of one network; those with equal seeds of a stage share it."""

    def __init__(self, name: str) -> None:
        self.network = architecture(name)
        self.plan = plan_of(self.network)
        self.depth = len(self.plan.names)
        self._made: dict[tuple[int, int], Callable[[torch.Tensor], torch.Tensor]] = {}

    def model(self, *seeds: int) -> Model:
        stages = tuple(self._stage(index, seed) for index, seed in enumerate(seeds))
        return Model(stages, {}, "", self.network.name, self.network.channels_last)

    def _stage(self, index: int, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if (index, seed) not in self._made:
            torch.manual_seed(seed)
            network = self.network.build()
            for one in network.modules():  # as after a training: else all tenants' are the same
                if isinstance(one, nn.BatchNorm2d):
                    nn.init.uniform_(one.weight, 0.5, 1.5)
                    nn.init.normal_(one.running_mean, 0, 0.1)
                    nn.init.uniform_(one.running_var, 0.5, 1.5)
            state = network.state_dict()
            tensors = {
                name: device_tensor(state[name], channels_last=self.network.channels_last)
                for name in self.plan.names[index]
            }
            self._made[index, seed] = self.plan.stage(index, tensors)
        return self._made[index, seed]


@pytest.fixture(params=["mnist-cnn", "mnist-resnet18"], scope="module")
def tenants(request: pytest.FixtureRequest) -> Tenants:
    return Tenants(request.param)


def rows_of(sizes: list[int]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.rand(size, 1, 28, 28, generator=random) * 2 - 1 for size in sizes]


@pytest.mark.parametrize("padded", [lambda count: count, lambda count: 1 << (count - 1).bit_length()])
def test_models_that_share_nothing_answer_as_alone(tenants: Tenants, padded: Callable[[int], int]) -> None:
    stacks = Stacks(architecture, padded)
    models = [tenants.model(*(seed,) * tenants.depth) for seed in range(5)]
    rows = rows_of([1, 4, 2, 1, 3])
    with torch.inference_mode():
        together = forward(models, rows, padded, stacks)
        for model, part, found in zip(models, rows, together, strict=True):
            wanted = model(part)
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert stacks.passes == 1


def test_what_is_shared_runs_once_and_the_rest_in_a_stack(tenants: Tenants) -> None:
    stacks = Stacks(architecture)
    base, count = (0,) * tenants.depth, tenants.depth
    for split in range(count):
        models = [tenants.model(*base[:split], *(seed,) * (count - split)) for seed in (1, 2, 3)]
        models.append(tenants.model(*(9,) * count))
        rows = rows_of([2, 1, 3, 2])
        before = stacks.passes
        with torch.inference_mode():
            for model, part, found in zip(models, rows, forward(models, rows, stacks=stacks), strict=True):
                torch.testing.assert_close(found, model(part), rtol=1e-4, atol=1e-5)
        assert stacks.passes == before + 1, "one stack, at the depth where they part"


def test_more_models_than_a_slab_has_places_take_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "MOST_MODELS", 3)
    tenants, stacks = Tenants("mnist-cnn"), Stacks(architecture)
    models = [tenants.model(*(seed,) * tenants.depth) for seed in range(7)]
    rows = rows_of([1] * 7)
    with torch.inference_mode():
        for model, part, found in zip(models, rows, forward(models, rows, stacks=stacks), strict=True):
            torch.testing.assert_close(found, model(part), rtol=1e-4, atol=1e-5)
    assert stacks.passes == 3
    assert MOST_MODELS == 16


def test_a_stack_keeps_nothing_of_a_model() -> None:
    """On a device: the pattern of a weight is in its own memory, and nowhere once that is overwritten."""
    runtime = SimulatedCuda()
    device = CudaDevice(runtime)
    tenants, stacks = Tenants("mnist-cnn"), Stacks(architecture)
    network = tenants.network
    models, placed = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        state = network.build().state_dict()
        host = {name: device_tensor(one, channels_last=network.channels_last) for name, one in state.items()}
        placed.append(device.place(host))
        stages = tuple(tenants.plan.stage(index, placed[-1]) for index in range(tenants.depth))
        models.append(Model(stages, {}, "", network.name, network.channels_last))
    pattern = placed[0]["fc1.weight"].numpy().tobytes()[:4096]
    rows = [np.random.default_rng(seed).random((2, 1, 28, 28), np.float32) for seed in range(3)]
    found = device.launch(rows, lambda given: forward(models, given, device.padded, stacks)).wait()
    assert stacks.passes == 1
    for model, part, one in zip(models, rows, found, strict=True):
        with torch.inference_mode():
            np.testing.assert_allclose(one, model(torch.from_numpy(part)).numpy(), rtol=1e-4, atol=1e-5)
    slabs = [
        slab for stage in stacks._stacks["mnist-cnn"]._stages for layer in stage for slab in layer._slabs
    ]  # type: ignore[union-attr]  # it was made
    assert slabs and not any(slab.any() for slab in slabs)
    assert pattern in runtime.contents()
    device.scrub(placed[0].values())
    assert pattern not in runtime.contents()
    assert runtime.violations == []


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    store, network = MemoryStore(), architecture("mnist-cnn")
    registry = Registry(store)
    for number in range(4):
        torch.manual_seed(number)
        registry.create_tenant(TenantId(f"t{number}"))
        registry.register(
            TenantId(f"t{number}"), save(dict(network.build().state_dict())), network.name, network.tensors,
            probe=lambda weights: probe_logits(network, weights),
        )  # fmt: skip
    return store


def device_of(name: str) -> Device:
    return CpuDevice() if name == "cpu" else CudaDevice(SimulatedCuda(1 << 32))


@pytest.mark.parametrize("name", ["cpu", "simulated"])
async def test_a_replica_that_stacks_answers_as_one_that_does_not(store: MemoryStore, name: str) -> None:
    rows = np.random.default_rng(1).random((2, 1, 28, 28), dtype=np.float32)

    async def answers(stack: bool) -> tuple[list[np.ndarray], int]:
        settings = Settings(host_dir="off", device="auto", slots=4, stack_models=stack)
        replica = Replica.build(settings, store, device=device_of(name))

        async def ask(ref: str) -> np.ndarray:
            with await replica.service.enter(LOCAL_OPERATOR, ModelRef.parse(ref)) as ticket:
                return (await replica.service.predict(ticket, lambda network: rows)).logits

        found: list[np.ndarray] = []
        for _ in range(6):
            found += await asyncio.gather(*(ask(f"t{number}") for number in range(4)))
        stacks = replica.inference._stacks
        await replica.close()
        return found, stacks.passes if stacks is not None else 0

    (plain, none), (together, passes) = await answers(False), await answers(True)
    assert none == 0 < passes
    for one, other in zip(plain, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


async def test_a_stack_that_computes_something_else_is_not_used_again(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass asks one of its models for its probe; all are right alone, so it is the stack that is not."""
    run = Stacks.run
    monkeypatch.setattr(
        Stacks, "run", lambda self, *given: [one + 0.1 for one in found] if (found := run(self, *given)) else found
    )  # fmt: skip
    replica = Replica.build(Settings(host_dir="off", device="cpu", slots=4, stack_models=True), store)
    rows = np.zeros((1, 1, 28, 28), np.float32)

    async def ask(ref: str) -> list[int]:
        with await replica.service.enter(LOCAL_OPERATOR, ModelRef.parse(ref)) as ticket:
            return (await replica.service.predict(ticket, lambda network: rows)).label_list()

    found = [await asyncio.gather(*(ask(f"t{number}") for number in range(4))) for _ in range(6)]
    assert all(one == found[0] for one in found), "no wrong answer came out"
    stacks = replica.inference._stacks
    assert stacks is not None and not stacks.takes("mnist-cnn")
    assert replica.cache.occupied == 4, "and no model was blamed"
    await replica.close()
    assert list(itertools.islice(found, 1))


async def test_a_model_that_went_wrong_is_found_in_a_stack_and_goes(store: MemoryStore) -> None:
    """It is asked alone, too, although it owes no probe: the stack is not what is wrong."""
    device = CudaDevice(SimulatedCuda(1 << 32))
    replica = Replica.build(
        Settings(host_dir="off", device="auto", slots=4, stack_models=True), store, device=device
    )
    rows = np.zeros((1, 1, 28, 28), np.float32)

    async def ask(number: int) -> str:
        with await replica.service.enter(LOCAL_OPERATOR, ModelRef.parse(f"t{number}")) as ticket:
            try:
                (await replica.service.predict(ticket, lambda network: rows)).label_list()
            except ProbeFailed:
                return "condemned"
            return "answered"

    for number in range(4):
        await ask(number)
    (bad,) = (one for one in replica.cache._residency.lendable() if one.record.tenant == "t2")
    assert bad.model is not None
    max(bad.model.tensors.values(), key=lambda one: one.numel()).mul_(1.5)
    found: list[list[str]] = []
    for _ in range(40):  # which model a pass asks goes round
        found.append(list(await asyncio.gather(*(ask(number) for number in range(4)))))
        if "condemned" in found[-1]:
            break
    assert found[-1] == ["answered", "answered", "condemned", "answered"]
    stacks = replica.inference._stacks
    assert stacks is not None and stacks.takes("mnist-cnn")
    await replica.close()


async def test_a_stack_that_can_not_be_computed_is_not_tried_again(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``vmap`` does not know each operation of an operator's own network."""

    def raising(self: Stacks, *given: object) -> None:
        raise RuntimeError("vmap: there is no batching rule")

    monkeypatch.setattr(Stacks, "run", raising)
    replica = Replica.build(Settings(host_dir="off", device="cpu", slots=4, stack_models=True), store)
    rows = np.zeros((1, 1, 28, 28), np.float32)

    async def ask(number: int) -> list[int]:
        with await replica.service.enter(LOCAL_OPERATOR, ModelRef.parse(f"t{number}")) as ticket:
            return (await replica.service.predict(ticket, lambda network: rows)).label_list()

    for _ in range(4):
        assert len(await asyncio.gather(*(ask(number) for number in range(4)))) == 4
    stacks = replica.inference._stacks
    assert stacks is not None and not stacks.takes("mnist-cnn")
    await replica.close()
