"""What a replica says of its load: plain values, from which copies and replicas are decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Held", "ReplicaLoad", "demand"]


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica over the last seconds.

    Attributes
    ----------
    place
        Its number on the ring.
    ongoing
        Requests that had their model and were in a pass, or waited for one: the mean number.
    loading
        Requests that waited for the registry or for their model's load: the mean number.
    requests_per_s
        Requests that came, refused ones too. Counted, not sampled: a request of a millisecond counts.
    idle_s
        Seconds since the last request came; since the start when none did.
    models
        By model ref, its mean number of ``ongoing`` requests; only models that had some.
    popular
        The few models with the most requests a second since they were loaded, with these rates.
    also
        Of these models, by ref: the other refs that mean the same version now.
    """

    replica: str
    place: int
    ongoing: float
    loading: float
    requests_per_s: float
    idle_s: float
    models: Mapping[str, float] = field(default_factory=dict)
    popular: Mapping[str, float] = field(default_factory=dict)
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Held:
    """What a replica holds.

    Attributes
    ----------
    models
        Refs, most recently used first.
    """

    replica: str
    place: int
    slots: int
    models: Sequence[str]


def demand(loads: Sequence[ReplicaLoad]) -> dict[str, float]:
    """Requests under way by model, over all replicas."""
    total: dict[str, float] = {}
    for load in loads:
        for model_ref, ongoing in load.models.items():
            total[model_ref] = total.get(model_ref, 0.0) + ongoing
    return total
