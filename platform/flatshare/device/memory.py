"""What a device says of its memory. No torch: this goes to the control plane."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DeviceMemory"]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What the device itself says, in bytes; zeros where it has nothing to say.

    Attributes
    ----------
    allocated
        Of this process's tensors.
    reserved
        What the allocator took from the device for them; this is what runs out.
    free, total
        Of the whole device, whoever has the rest.
    """

    allocated: int = 0
    reserved: int = 0
    free: int = 0
    total: int = 0
