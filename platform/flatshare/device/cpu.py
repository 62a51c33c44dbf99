"""The CPU as a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from flatshare.device.memory import DeviceMemory
from flatshare.device.protocol import K

__all__ = ["CpuDevice"]


class CpuDevice:
    """Host memory: tensors stay where they are, mapped files included."""

    name = "cpu"
    torch_device = torch.device("cpu")
    computes_in_host_memory = True

    def footprint(self, size_bytes: int) -> int:
        """See :class:`Device`."""
        return size_bytes

    def stage(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """See :class:`Device`."""
        return tensors

    async def place(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """See :class:`Device`: nothing to wait for, so a load commits in the step in which it evicts."""
        return tensors

    def scrub(self, tensors: Iterable[torch.Tensor]) -> int:
        """See :class:`Device`: what torch itself allocated. Views of files can't be written, and must not."""
        own = [tensor for tensor in tensors if tensor.untyped_storage().resizable()]
        for tensor in own:
            tensor.zero_()
        return sum(tensor.nbytes for tensor in own)

    def memory(self) -> DeviceMemory:
        """See :class:`Device`."""
        return DeviceMemory()
