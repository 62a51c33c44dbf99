"""The conformance suite on every device that is here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flatshare.device.cpu import CpuDevice
from flatshare.device.cuda import CudaDevice
from flatshare.device.testing.device_suite import DeviceSuite
from flatshare.device.testing.simulated_cuda import SimulatedCuda
from flatshare.device.torch_cuda import TorchCuda


class TestCpu(DeviceSuite):
    @pytest.fixture
    def device(self) -> CpuDevice:
        return CpuDevice()


@pytest.mark.parametrize("expandable", [False, True], ids=["segments", "expandable"])
class TestSimulatedCuda(DeviceSuite):
    @pytest.fixture
    def device(self, expandable: bool) -> Iterator[CudaDevice]:
        runtime = SimulatedCuda(expandable_segments=expandable)
        yield CudaDevice(runtime, chunk_bytes=4096)
        assert runtime.violations == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
class TestCuda(DeviceSuite):
    @pytest.fixture
    def device(self) -> CudaDevice:
        return CudaDevice(TorchCuda())
