"""What a device says of its memory. No torch: this goes to the control plane."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DeviceMemory"]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What the device itself says, in bytes; zeros where it has nothing to say."""

    allocated: int = 0
    free: int = 0
    total: int = 0
