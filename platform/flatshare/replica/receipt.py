"""What a replica tells of an erasure: plain values that pickle."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EraseReceipt", "HostReceipt"]


@dataclass(frozen=True, slots=True)
class EraseReceipt:
    """One replica's part in an erasure.

    Attributes
    ----------
    device
        ``cpu`` or ``cuda``. On CUDA the memory of models that were evicted before was overwritten as they
        went, and so were the pinned buffers that they came through.
    models
        Residents that went since the erasure began here.
    overwritten_bytes
        Of the device's memory; the rest were files of the host tier, or other tenants' too.
    clean
        Whether nothing of the tenant is left: no resident, no load under way, nothing that is yet to be, or
        could not be, overwritten.
    at
        POSIX seconds.
    """

    replica: str
    node_id: str
    device: str
    models: int
    overwritten_bytes: int
    clean: bool
    at: float


@dataclass(frozen=True, slots=True)
class HostReceipt:
    """One node's host tier's part, as one of its replicas did it.

    Attributes
    ----------
    removed, kept
        Digests of tensors; those that are kept are mapped for another tenant that has them too.
    """

    replica: str
    node_id: str
    node: str
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    overwritten_bytes: int
    at: float
