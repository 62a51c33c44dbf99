"""The device that the settings mean, and how much of it models may take."""

from __future__ import annotations

import torch

from flatshare.device.cpu import CpuDevice
from flatshare.device.cuda import CudaDevice
from flatshare.device.protocol import Device
from flatshare.errors import SettingsError

__all__ = ["device_budget", "open_device"]


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
