"""What a replica reports about an erasure: plain values that pickle."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EraseReceipt", "HostReceipt"]


@dataclass(frozen=True, slots=True)
class EraseReceipt:
    """One replica's part in an erasure.

    Attributes
    ----------
    device
        ``cpu`` or ``cuda``. On CUDA, the memory of models evicted earlier was overwritten at their eviction,
        and so were the pinned buffers that they were copied through.
    models
        Resident models that were freed since the erasure began here.
    overwritten_bytes
        Of the device's memory; the rest was in files of the host tier, or shared with other tenants.
    clean
        Whether nothing of the tenant is left: no resident model, no load under way, and no memory that is
        still to be overwritten or could not be.
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
    """The part of one node's host tier in an erasure, as carried out by one of the node's replicas.

    Attributes
    ----------
    removed, kept
        Digests of tensors; the kept ones are mapped for another tenant that has them too.
    """

    replica: str
    node_id: str
    node: str
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    overwritten_bytes: int
    at: float
