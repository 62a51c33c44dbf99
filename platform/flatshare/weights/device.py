"""Devices: how tensors get onto one, what they take there, and how much there is.

``CudaDevice`` is the only code that CUDA alone runs: :meth:`~CudaDevice.stage`, ``place``, ``scrub``
and ``memory``. Everything above is the same on both, and its tests run on ``CpuDevice``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Protocol

import torch

from flatshare.errors import SettingsError
from flatshare.weights.threads import in_thread
from flatshare.weights.tiers import DeviceMemory, Part

__all__ = ["CpuDevice", "CudaDevice", "Device", "device_budget", "open_device"]

CUDA_BLOCK_BYTES: Final = 512
"""What PyTorch's CUDA allocator rounds each tensor up to, in bytes (CUDACachingAllocator, kMinBlockSize)."""


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

    def stage(self, tensors: Mapping[Part, torch.Tensor]) -> Mapping[Part, torch.Tensor]:
        """Get tensors ready for the way to the device; in a load thread, before room is made."""
        ...

    async def place(self, tensors: Mapping[Part, torch.Tensor]) -> Mapping[Part, torch.Tensor]:
        """Put staged tensors on the device; when this returns they can be used by any stream."""
        ...

    def scrub(self, tensors: Iterable[torch.Tensor]) -> int:
        """Overwrite tensors that nobody uses any more; returns how many bytes."""
        ...

    def memory(self) -> DeviceMemory:
        """The device's own accounts."""
        ...


class CpuDevice:
    """Host memory: tensors stay where they are, mapped files included."""

    name = "cpu"
    torch_device = torch.device("cpu")
    computes_in_host_memory = True

    def footprint(self, size_bytes: int) -> int:
        """See :class:`Device`."""
        return size_bytes

    def stage(self, tensors: Mapping[Part, torch.Tensor]) -> Mapping[Part, torch.Tensor]:
        """See :class:`Device`."""
        return tensors

    async def place(self, tensors: Mapping[Part, torch.Tensor]) -> Mapping[Part, torch.Tensor]:
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

    def stage(self, tensors: Mapping[Part, torch.Tensor]) -> Mapping[Part, torch.Tensor]:
        """See :class:`Device`: page-locked copies, which the device can read without the CPU.

        PyTorch's pinned allocator keeps and reuses the buffers, so a load does not pin memory anew.
        """
        return {part: tensor.pin_memory() for part, tensor in tensors.items()}

    async def place(self, tensors: Mapping[Part, torch.Tensor]) -> Mapping[Part, torch.Tensor]:
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

    def _copy(self, tensors: Mapping[Part, torch.Tensor]) -> Mapping[Part, torch.Tensor]:
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


def open_device(wanted: str) -> Device:
    """The device that a setting means on this machine.

    Raises
    ------
    SettingsError
        ``cuda`` was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise SettingsError("device=cuda, but this replica sees no CUDA device; set gpus_per_replica above 0")
    return CudaDevice() if wanted != "cpu" and available else CpuDevice()


def device_budget(device: Device, setting: int, headroom: int, share: float) -> int | None:
    """Bytes that models may take: the setting, or what the device has, but for headroom.

    Parameters
    ----------
    setting
        0 to ask the device; a device without memory of its own has no bound.
    headroom
        Bytes left for activations and the libraries' own buffers.
    share
        Part of the device that is this replica's; the others of the same device have the rest.

    Raises
    ------
    SettingsError
        Nothing is left.
    """
    if setting:
        return setting
    memory = device.memory()
    if not memory.total:
        return None
    budget = min(memory.free, int(memory.total * min(share, 1.0))) - headroom
    if budget <= 0:
        raise SettingsError(
            f"the device has {memory.free} of {memory.total} bytes free: device_headroom_bytes={headroom} "
            "leaves nothing for models"
        )
    return budget
