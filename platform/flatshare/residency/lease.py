"""A slot's content, and a request's hold on it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flatshare.errors import ServeError
from flatshare.weights.tiers import LeaseTag, Part, State, Tier
from flatshare_registry.records import VersionRecord

if TYPE_CHECKING:  # torch: the control plane counts quotas with these types, and has none
    from flatshare.models.stages import Model

__all__ = ["Erased", "Lease", "Resident"]


@dataclass(slots=True)
class Erased:
    """What a replica has erased of a tenant so far.

    Attributes
    ----------
    models
        Resident models that were freed.
    overwritten_bytes
        Of their memory; the rest was in files of the host tier, or shared with other tenants.
    failed
        Something could not be overwritten: only the end of the process frees it for sure.
    """

    models: int = 0
    overwritten_bytes: int = 0
    failed: bool = False


@dataclass(slots=True, eq=False)
class Resident:
    """A slot's content.

    Attributes
    ----------
    parts
        What it holds, with device bytes; other residents may hold the same.
    state
        Only ``resident`` ones can be leased.
    probe_due
        It must answer its probe together with its first rows.
    erased
        Set when its tenant is erased: its memory is overwritten when it is freed, and counted here.
    """

    record: VersionRecord
    model: Model | None
    parts: Mapping[Part, int]
    tier: Tier
    tag: LeaseTag
    loaded_at: float
    last_used_at: float
    hits: int = 0
    leases: int = 0
    pinned: bool = False
    probe_due: bool = False
    state: State = State.RESIDENT
    erased: Erased | None = None

    @property
    def size_bytes(self) -> int:
        """Of all its parts, shared or not."""
        return sum(self.parts.values())


class Lease:
    """A request's hold on a resident model: while it lives the model can't be freed.

    A context manager; releasing twice is harmless.

    Attributes
    ----------
    record
        The version that is held.
    tier
        Where this request found it.
    """

    __slots__ = ("_model_id", "_released", "_resident", "record", "tag", "tier")

    def __init__(self, resident: Resident, tier: Tier, released: Callable[[Resident], None]) -> None:
        self._released = released
        self._resident: Resident | None = resident
        self.record = resident.record
        self.tag = resident.tag
        self.tier = tier
        self._model_id = id(resident.model)

    @property
    def model(self) -> Model:
        """The model; only while the lease lives."""
        if self._resident is None or self._resident.model is None:
            raise ServeError("a lease was used after its release")
        return self._resident.model

    def is_intact(self, model_id: Hashable) -> bool:
        """Whether the slot holds what it held when this was granted, and what the version's record says.

        The slot, its tag, the model in it and the digest of the weights that the model was built of are
        four statements made in different places; here they must agree.

        Parameters
        ----------
        model_id
            ``id`` of the model that runs.
        """
        resident = self._resident
        return (
            resident is not None
            and resident.model is not None
            and resident.tag == self.tag
            and id(resident.model) == self._model_id == model_id
            and resident.model.digest == self.record.digest == self.tag.digest
        )

    @property
    def resident(self) -> Resident | None:
        """The slot; None after the release."""
        return self._resident

    def release(self) -> None:
        """Give the model back."""
        resident, self._resident = self._resident, None
        if resident is not None:
            self._released(resident)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
