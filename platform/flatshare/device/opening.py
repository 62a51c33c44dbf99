"""The device that the settings mean, and how much of it models may take."""

from __future__ import annotations

import logging
from typing import Final

import torch

from flatshare.device.cpu import CpuDevice
from flatshare.device.cuda import CudaDevice
from flatshare.device.faults import first_line
from flatshare.device.protocol import Device
from flatshare.device.torch_cuda import TorchCuda
from flatshare.errors import SettingsError

__all__ = ["CONTEXT_BYTES", "device_budget", "most_bytes", "open_device"]

logger = logging.getLogger("flatshare.device")

CONTEXT_BYTES: Final = 600 * 1024**2
"""What a process takes of a device beside torch's allocator: context, kernels, libraries' handles. pytorch
issues 20532 and 58466 tell of 0.3 to 0.6 GB; ``scripts/gpu-checks`` measures it."""


def open_device(wanted: str, share: float = 0.0) -> Device:
    """The device that a setting means on this machine.

    Parameters
    ----------
    share
        Part of a GPU that is reserved for this process; 0 if none is.

    Raises
    ------
    SettingsError
        ``cuda`` was asked for, or a GPU was reserved, and there is none; or it does not compute.
    """
    available = torch.cuda.is_available()
    if not available and wanted != "cpu" and (share or wanted == "cuda"):
        asked = "device=cuda" if wanted == "cuda" else f"gpus_per_replica={share:g}"
        raise SettingsError(
            f"{asked}, but torch {torch.__version__} finds no CUDA device here. It is built for CUDA "
            f"{torch.version.cuda or '-'}: an older driver (see nvidia-smi) looks like none. Mend that, or "
            "set device=cpu and gpus_per_replica=0"
        )
    if wanted == "cpu" or not available:
        return CpuDevice()
    try:
        total = torch.cuda.mem_get_info()[1]
        runtime = TorchCuda(most_bytes(total, share))
    except RuntimeError as error:  # in exclusive mode, without memory for one more context, damaged
        raise SettingsError(
            f"torch sees a CUDA device and can't use it ({first_line(error)}): see nvidia-smi"
        ) from error
    return CudaDevice(runtime)


def most_bytes(total: int, share: float) -> int:
    """Bytes that the allocator of a process with a share of a device may take; 0 for no bound."""
    return max(int(total * share) - CONTEXT_BYTES, 1) if 0 < share < 1 else 0


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
    memory = device.memory()
    if setting:
        if memory.total and setting > memory.free:
            logger.warning(
                "device_bytes=%d, and the device has %d bytes free: loads will find no memory, and evict",
                setting,
                memory.free,
            )
        return setting
    if not memory.total:
        return None
    budget = min(memory.free, int(memory.total * min(share, 1.0))) - headroom
    bound = most_bytes(memory.total, share)
    if bound:  # and the allocator itself takes no more, activations included
        budget = min(budget, bound)
    if budget <= 0:
        raise SettingsError(
            f"the device has {memory.free} of {memory.total} bytes free: device_headroom_bytes={headroom} "
            "leaves nothing for models"
        )
    return budget
