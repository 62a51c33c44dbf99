"""What the fleet's keeper decides, as others see it, and what it asks of the fleet and of Serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flatshare.placement.load import Held, ReplicaLoad
from flatshare.placement.scaling import Bounds

__all__ = ["AsksFleet", "Drained", "Placement", "Routes", "Scaler"]


class Scaler(Protocol):
    """The pool's number of replicas; calls block."""

    def wanted(self) -> int:
        """How many Serve keeps running.

        Raises
        ------
        Unavailable
            Serve can't say.
        """
        ...

    def scale(self, replicas: int) -> None:
        """Have Serve keep this many replicas. Raises as :meth:`wanted`."""
        ...

    def newest(self) -> str | None:
        """The replica that Serve would stop first."""
        ...

    def end(self, replica: str) -> None:
        """End a replica's process; Serve starts another one at its place. Raises as :meth:`wanted`."""
        ...


class AsksFleet(Protocol):
    """What the keeper asks of the fleet."""

    async def loads(self) -> list[ReplicaLoad]:
        """How busy replicas are."""
        ...

    async def held(self) -> list[Held]:
        """What replicas hold."""
        ...

    async def warm(self, wanted: Mapping[str, Sequence[str]], within_s: float) -> dict[str, list[str]]:
        """Have replicas load models."""
        ...


@dataclass(frozen=True, slots=True)
class Routes:
    """What edges must know beside the ring.

    Attributes
    ----------
    models
        Places of models that were moved, or have copies.
    draining
        Replicas that get no new request.
    """

    models: dict[str, tuple[int, ...]]
    draining: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Drained:
    """A replica that was emptied and ended.

    Attributes
    ----------
    handed_over
        Models that others loaded before.
    waited_s
        Seconds until its last request had ended.
    """

    replica: str
    handed_over: int
    waited_s: float


@dataclass(frozen=True, slots=True)
class Placement:
    """What was decided last.

    Attributes
    ----------
    copies
        Places by model ref, of models that more than one replica serves; each of them holds it.
    bounds
        Between which the number of replicas is decided.
    wanted
        Replicas that Serve is told to keep; None while Serve has not said.
    moved
        Places by model ref, of models that do not live at the ring's home.
    wish
        What the load of the last moment wants.
    imbalance
        Requests a second of the busiest replica over the mean of all; None while nothing comes.
    """

    copies: Mapping[str, tuple[int, ...]]
    bounds: Bounds
    wanted: int | None
    wish: int | None
    imbalance: float | None = None
    moved: Mapping[str, int] = field(default_factory=dict)
