"""The two halves of a load, as the cache sees them: prepare in host memory, then place on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from flatshare.models.stages import Model
from flatshare.weights.tiers import Part, Tier
from flatshare_registry.records import VersionRecord

__all__ = ["Held", "Loader", "Placed", "Prepared"]

Held = Mapping[Part, object]
"""Parts that the device has already, and what keeps them there for as long as this value lives."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Checked tensors in host memory, by part; the model too where the device computes in host memory.

    Attributes
    ----------
    proven
        See :class:`Placed`.
    """

    tensors: Mapping[Part, torch.Tensor]
    tier: Tier
    model: Model | None = None
    proven: bool = True


@dataclass(frozen=True, slots=True)
class Placed:
    """A model that is ready to run, and the parts that it holds with their device bytes (measured).

    Attributes
    ----------
    proven
        Whether it has answered its probe. One that was proven before and is loaded again from the same
        checked bytes answers it together with its first rows.
    """

    model: Model
    parts: Mapping[Part, int]
    proven: bool = True


class Loader(Protocol):
    """Makes versions into models on a device. All methods are called on one event loop."""

    def check(self, record: VersionRecord) -> Mapping[Part, int]:
        """Refuse what can't be placed, before anything is fetched or evicted; else the bytes it claims.

        Raises
        ------
        ModelFailed
            Its architecture is not installed here, or has other tensors.
        """
        ...

    def hold(self, record: VersionRecord) -> Held:
        """Those of a version's parts that the device has, whoever's they are."""
        ...

    def distrust(self, record: VersionRecord) -> None:
        """Do not use again whatever this process kept of a version: it is wrong, or erased."""
        ...

    def let_go(self) -> None:
        """Drop all tensors kept ready that no model holds: some of them are being erased."""
        ...

    def stop(self, tenant: str) -> None:
        """Publish nothing more of an erased tenant, whatever a thread still has of it."""
        ...

    async def ended(self, tenant: str, timeout_s: float) -> bool:
        """Wait until no thread works on a tenant's weights, abandoned loads included; returns whether none
        does.
        """
        ...

    @property
    def overwrites_what_leaves(self) -> bool:
        """Whether a model's memory is to be overwritten when it is evicted too."""
        ...

    def scrub(self, model: Model, parts: Collection[Part]) -> int:
        """Overwrite a model's parts that no other model has, just before it is let go of.

        Returns
        -------
        int
            Bytes that are overwritten, or will be (:meth:`settle`). Mapped files are not overwritten: the
            host tier does that.

        Raises
        ------
        DeviceBroken, DeviceFull, ModelFailed
            The device did not do it.
        """
        ...

    def scrub_held(self, held: Held, parts: Collection[Part], model: Model | None) -> int:
        """As :meth:`scrub`, for parts that only one load still has, which ends without a resident model.

        Parameters
        ----------
        model
            The model that the load had built from them, if it got that far.

        Raises
        ------
        DeviceBroken, DeviceFull, ModelFailed
            The device did not do it.
        """
        ...

    async def settle(self) -> None:
        """Wait until everything that was to be overwritten so far has been overwritten.

        Raises
        ------
        DeviceBroken
            The device can't tell.
        """
        ...

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        """As :meth:`prepare`, from this node only; None when something must come from the store."""
        ...

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        """Get, check and try out what is not ``held``: whatever can be wrong with a version shows here.

        This is so even if the device does not compute in host memory: the version is tried on the CPU first.

        Raises
        ------
        Corrupt, Unavailable
            From the store.
        ModelFailed
            It does not build, or does not answer its probe as it did at its registration.
        """
        ...

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        """Put a prepared version on the device.

        Raises
        ------
        DeviceFull
            The device is out of memory now.
        DeviceBroken
            The device failed, and with it this process.
        ModelFailed
            The device refused it otherwise.
        """
        ...
