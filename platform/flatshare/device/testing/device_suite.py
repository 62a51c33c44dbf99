"""What every device promises, as tests: subclass it, and give it a device.

class TestMine(DeviceSuite):
@pytest.fixture
def device(self) -> Mine:
return Mine()
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flatshare.device.protocol import Device
from flatshare.errors import DeviceBroken

__all__ = ["DeviceSuite"]

Affine = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def _rows(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, 5), dtype=np.float32)


def _weights(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(3, 5, generator=random), "bias": torch.randn(3, generator=random)}


def _pass(*models: dict[str, torch.Tensor]) -> Affine:
    def work(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            torch.nn.functional.linear(one, model["weight"], model["bias"])
            for one, model in zip(rows, models, strict=True)
        ]

    return work


def _wanted(rows: NDArray[np.float32], model: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    wanted: NDArray[np.float32] = rows @ model["weight"].numpy().T + model["bias"].numpy()
    return wanted


class DeviceSuite:
    """A device must pass all of these tests."""

    @pytest.fixture
    def device(self) -> Device:
        """The device under test; give your own."""
        raise NotImplementedError

    def test_what_was_placed_computes_as_in_host_memory(self, device: Device) -> None:
        """Also one row, and 1,000."""
        host = _weights(1)
        placed = dict(device.place(host))
        for count in (1, 2, 17, 64, 65, 1000):
            (found,) = device.launch([_rows(count)], _pass(placed)).wait()
            np.testing.assert_allclose(found, _wanted(_rows(count), host), rtol=1e-4, atol=1e-5)

    def test_a_pass_of_several_models_gives_each_its_own(self, device: Device) -> None:
        """In their order, whatever their numbers of rows are."""
        hosts = [_weights(seed) for seed in range(4)]
        placed = [dict(device.place(one)) for one in hosts]
        rows = [_rows(count, count) for count in (3, 1, 64, 2)]
        found = device.launch(rows, _pass(*placed)).wait()
        for one, given, host in zip(found, rows, hosts, strict=True):
            np.testing.assert_allclose(one, _wanted(given, host), rtol=1e-4, atol=1e-5)

    def test_the_next_pass_may_be_launched_before_the_last_is_waited_for(self, device: Device) -> None:
        """Ten passes, two under way at a time; rows may be reused as soon as a pass is launched."""
        host = _weights(1)
        placed = dict(device.place(host))
        before = None
        for number in range(10):
            rows = _rows(8, number)
            wanted = _wanted(rows, host)
            launched = device.launch([rows], _pass(placed))
            rows[:] = -1
            if before is not None:
                np.testing.assert_allclose(before[0].wait()[0], before[1], rtol=1e-4, atol=1e-5)
            before = launched, wanted
            if not device.overlaps:
                np.testing.assert_allclose(before[0].wait()[0], before[1], rtol=1e-4, atol=1e-5)
                before = None
        if before is not None:
            np.testing.assert_allclose(before[0].wait()[0], before[1], rtol=1e-4, atol=1e-5)

    def test_passes_under_way_may_be_waited_for_in_any_order(self, device: Device) -> None:
        """Each has its own answer, also beside passes that raise: a retry comes while the next is under
        way.
        """
        host = _weights(1)
        placed = dict(device.place(host))

        def bad(rows: list[torch.Tensor]) -> list[torch.Tensor]:
            raise ValueError("it fails, and is tried again")

        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
            rows = [_rows(8, number) for number in range(4)]
            launched = []
            for one in rows:
                launched.append(device.launch([one], _pass(placed)))
                with pytest.raises(ValueError, match="tried again"):
                    device.launch([one], bad)
            for number in order:
                (found,) = launched[number].wait()
                np.testing.assert_allclose(found, _wanted(rows[number], host), rtol=1e-4, atol=1e-5)

    def test_an_answer_is_the_callers(self, device: Device) -> None:
        """Later passes do not change it."""
        placed = dict(device.place(_weights(1)))
        (first,) = device.launch([_rows(4, 1)], _pass(placed)).wait()
        kept = first.copy()
        for number in range(4):
            device.launch([_rows(4, number + 2)], _pass(placed)).wait()
        assert (first == kept).all()

    def test_a_pass_that_raises_costs_the_next_one_nothing(self, device: Device) -> None:
        """Whatever the error was, as long as it is not the device's."""
        host = _weights(1)
        placed = dict(device.place(host))

        def bad(rows: list[torch.Tensor]) -> list[torch.Tensor]:
            raise ValueError("a network of an operator's own")

        for number in range(3):
            with pytest.raises(ValueError, match="of an operator's own") as caught:
                device.launch([_rows(4, number)], bad)
            assert device.judge(caught.value) == "other"
            (found,) = device.launch([_rows(4, number)], _pass(placed)).wait()
            np.testing.assert_allclose(found, _wanted(_rows(4, number), host), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("size", [(0,), (1,), (3, 4), (1000, 1000), (2, 3, 8, 8)])
    def test_every_size_arrives_whole(self, device: Device, size: tuple[int, ...]) -> None:
        """Memory order included, and types that are no floats."""
        tensor = torch.arange(int(np.prod(size))).reshape(size)
        order = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        for one in (tensor.to(torch.uint8), tensor.double(), tensor.contiguous(memory_format=order)):
            placed = device.place({"it": one})["it"]
            assert (placed.dtype, placed.shape, placed.stride()) == (one.dtype, one.shape, one.stride())
            assert torch.equal(placed.cpu(), one)

    async def test_what_is_scrubbed_is_zero(self, device: Device) -> None:
        """After :meth:`Device.settle`."""
        placed = dict(device.place({name: one.clone() for name, one in _weights(1).items()}))
        assert device.scrub(placed.values()) == sum(one.nbytes for one in placed.values())
        await device.settle()
        assert all(not one.cpu().any() for one in placed.values())

    async def test_a_pass_that_was_launched_before_is_not_scrubbed(self, device: Device) -> None:
        """Nor is one that comes after, of a model that was placed where the other had been."""
        hosts = [_weights(seed) for seed in range(12)]
        for host in hosts:
            placed = dict(device.place({name: one.clone() for name, one in host.items()}))
            launched = device.launch([_rows(8)], _pass(placed))
            if not device.overlaps:
                np.testing.assert_allclose(launched.wait()[0], _wanted(_rows(8), host), rtol=1e-4, atol=1e-5)
            device.scrub(placed.values())
            del placed
            gc.collect()
            if device.overlaps:
                np.testing.assert_allclose(launched.wait()[0], _wanted(_rows(8), host), rtol=1e-4, atol=1e-5)

    def test_what_a_tensor_takes_is_not_less_than_its_size(self, device: Device) -> None:
        """And grows with it."""
        sizes = [0, 1, 511, 513, 2**20, 2**20 + 1, 5 * 2**20, 9 * 2**20, 10 * 2**20, 11 * 2**20]
        taken = [device.footprint(size) for size in sizes]
        assert all(one >= size for one, size in zip(taken, sizes, strict=True))
        assert taken == sorted(taken)

    def test_padding_leaves_few_sizes_and_never_fewer_rows(self, device: Device) -> None:
        """At most 64 of them up to 64 rows, and no more than twice the rows."""
        padded = [device.padded(rows) for rows in range(1, 200)]
        assert all(rows <= found < 2 * rows + 64 for rows, found in enumerate(padded, 1))
        assert padded == sorted(padded)
        assert device.padded(0) == 0

    def test_no_memory_is_told_apart(self, device: Device) -> None:
        """Torch has a class for it, and its libraries have words."""
        assert device.judge(torch.OutOfMemoryError("CUDA out of memory")) == "memory"
        assert device.judge(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ...")) == "memory"
        assert device.judge(ValueError("x")) == "other"
        device.check(10)

    def test_a_healthy_device_says_so(self, device: Device) -> None:
        """:meth:`Device.check` raises for one that is not, and only for that."""
        device.check(10)
        broken = torch.AcceleratorError("CUDA error: device-side assert triggered\nmore")
        if device.judge(broken) == "broken":
            with pytest.raises(DeviceBroken, match="device-side assert triggered"):
                device.check(10)
