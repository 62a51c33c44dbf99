"""What every device can do."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Protocol, TypeVar

import torch

from flatshare.device.memory import DeviceMemory

__all__ = ["Device", "K"]

K = TypeVar("K", bound=Hashable)
"""What a caller calls its tensors."""


class Device(Protocol):
    """Where models run."""

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def torch_device(self) -> torch.device:
        """As torch knows it."""
        ...

    @property
    def computes_in_host_memory(self) -> bool:
        """Whether prepared tensors run as they are, so that nothing is copied when they are placed."""
        ...

    def footprint(self, size_bytes: int) -> int:
        """Bytes that a tensor of so many takes here."""
        ...

    def stage(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """Get tensors ready for the way to the device; in a load thread, before room is made."""
        ...

    async def place(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """Put staged tensors on the device; when this returns they can be used by any stream."""
        ...

    def scrub(self, tensors: Iterable[torch.Tensor]) -> int:
        """Overwrite tensors that nobody uses any more; returns how many bytes."""
        ...

    def memory(self) -> DeviceMemory:
        """The device's own accounts."""
        ...
