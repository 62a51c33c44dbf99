"""The CPU as a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flatshare.device.faults import fault_of
from flatshare.device.memory import DeviceMemory
from flatshare.device.protocol import Fault, K, Work

__all__ = ["CpuDevice"]


class CpuDevice:
    """Host memory: tensors stay where they are, mapped files included. See :class:`Device`."""

    name = "cpu"
    torch_device = torch.device("cpu")
    computes_in_host_memory = True
    overwrites_what_leaves = False
    overlaps = False

    def footprint(self, size_bytes: int) -> int:
        """See :class:`Device`."""
        return size_bytes

    def place(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """See :class:`Device`: they stay where they are."""
        return tensors

    def scrub(self, tensors: Iterable[torch.Tensor]) -> int:
        """See :class:`Device`: what torch itself allocated. Views of files can't be written, and must not."""
        own = [tensor for tensor in tensors if tensor.untyped_storage().resizable()]
        for tensor in own:
            tensor.zero_()
        return sum(tensor.nbytes for tensor in own)

    async def settle(self) -> None:
        """See :class:`Device`: it is done when it returns."""

    def launch(self, rows: Sequence[NDArray[np.float32]], work: Work) -> _Ended:
        """See :class:`Device`: computed here and now."""
        with torch.inference_mode():
            return _Ended([one.numpy() for one in work([torch.from_numpy(one) for one in rows])])

    def padded(self, rows: int) -> int:
        """See :class:`Device`: any size costs the same here."""
        return rows

    def judge(self, error: BaseException) -> Fault:
        """See :class:`Device`: host memory does not break."""
        return "memory" if fault_of(error) == "memory" else "other"

    def check(self, limit_s: float) -> None:
        """See :class:`Device`: nothing of it goes on in the background."""

    def memory(self) -> DeviceMemory:
        """See :class:`Device`."""
        return DeviceMemory()

    def close(self) -> None:
        """See :class:`Device`."""


class _Ended:
    """A pass that is over."""

    __slots__ = ("_logits",)

    def __init__(self, logits: list[NDArray[np.float32]]) -> None:
        self._logits = logits

    def wait(self) -> list[NDArray[np.float32]]:
        return self._logits
