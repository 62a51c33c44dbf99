"""One CUDA device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch

from flatshare.device.memory import DeviceMemory
from flatshare.device.protocol import K
from flatshare.threads import in_thread

__all__ = ["CudaDevice"]

CUDA_BLOCK_BYTES: Final = 512
"""What PyTorch's CUDA allocator rounds each tensor up to, in bytes (CUDACachingAllocator, kMinBlockSize)."""


class CudaDevice:
    """One CUDA device: pinned staging, copies on a stream of their own, an event instead of a barrier.

    Not yet run on a GPU (none was lent to this project); reviewed line by line against
    pytorch.org/docs/stable/notes/cuda.html (streams, ``record_stream``, pinned memory).
    """

    name = "cuda"
    computes_in_host_memory = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        # With TF32, torch's default for convolutions on Ampere and later, a right answer differs from the
        # CPU's by up to 1.5e-3, and by who shares its pass: kernels are chosen by batch size.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]  # torch gives it no types

    def footprint(self, size_bytes: int) -> int:
        """See :class:`Device`."""
        return -(-size_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES

    def stage(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """See :class:`Device`: page-locked copies, which the device can read without the CPU.

        PyTorch's pinned allocator keeps and reuses the buffers, so a load does not pin memory anew.
        """
        return {part: tensor.pin_memory() for part, tensor in tensors.items()}

    async def place(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """See :class:`Device`: the event loop goes on while the copies run; a thread waits for the event."""
        return await in_thread(None, lambda: self._copy(tensors))

    def scrub(self, tensors: Iterable[torch.Tensor]) -> int:
        """See :class:`Device`: on inference's stream, after all passes that were queued before."""
        size = 0
        for tensor in tensors:
            tensor.zero_()
            size += tensor.nbytes
        torch.cuda.current_stream(self.torch_device).synchronize()  # the record says that it is done
        return size

    def memory(self) -> DeviceMemory:
        """See :class:`Device`."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return DeviceMemory(torch.cuda.memory_allocated(self.torch_device), free, total)

    def _copy(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        with torch.cuda.stream(self._copies):
            # Allocated on this stream and used on inference's: record_stream keeps the allocator from
            # giving the memory to the next copy while a pass that was queued still reads it.
            placed = {
                part: tensor.to(self.torch_device, non_blocking=True) for part, tensor in tensors.items()
            }
            inference = torch.cuda.default_stream(self.torch_device)
            for tensor in placed.values():
                tensor.record_stream(inference)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch gives it no types
            copied.record(self._copies)
        copied.synchronize()  # of this event only; passes on other streams go on
        return placed
