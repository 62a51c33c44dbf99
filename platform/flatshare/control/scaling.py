"""The number of replicas, over HTTP: what is allowed, wanted and there; and how an operator changes it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flatshare.control.decided import Drained, Placement
from flatshare.control.keeper import Keeper
from flatshare_registry.errors import InvalidInput

__all__ = ["DrainedReply", "Scaling", "ScalingReply", "ScalingRequest"]


class ScalingRequest(BaseModel):
    """Between which numbers of replicas the pool may move."""

    model_config = ConfigDict(extra="forbid")

    min_replicas: int = Field(ge=0, le=1000, description="0: none while nothing comes.")
    max_replicas: int = Field(ge=1, le=1000)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        return self


class ScalingReply(BaseModel):
    """How many replicas there should be."""

    min_replicas: int
    max_replicas: int
    wanted: int | None = Field(description="Replicas that Serve keeps; null while it does not say.")
    wish: int | None = Field(description="What this moment's load asks for, before delays; null at first.")
    target_ongoing_requests: float
    upscale_delay_s: float
    downscale_delay_s: float
    downscale_to_zero_delay_s: float

    @classmethod
    def of(cls, placement: Placement) -> ScalingReply:
        """From what was decided last."""
        bounds = placement.bounds
        return cls(
            min_replicas=bounds.minimum,
            max_replicas=bounds.maximum,
            wanted=placement.wanted,
            wish=placement.wish,
            target_ongoing_requests=bounds.target_ongoing_requests,
            upscale_delay_s=bounds.upscale_delay_s,
            downscale_delay_s=bounds.downscale_delay_s,
            downscale_to_zero_delay_s=bounds.idle_s,
        )


class DrainedReply(BaseModel):
    """A replica that was emptied and ended; its replacement starts at its place."""

    replica: str
    handed_over: int = Field(description="Models that others loaded before.")
    waited_s: float = Field(description="Seconds until its last request had ended.")


class Scaling:
    """What an operator may ask of the keeper.

    Parameters
    ----------
    remember
        Keeps the numbers where a new control plane finds them; blocks.
    can_wake
        Whether an edge sees the request that wakes a pool without a replica.
    """

    def __init__(
        self, keeper: Keeper, remember: Callable[[int, int], None], *, can_wake: bool = True
    ) -> None:
        self._keeper = keeper
        self._can_wake = can_wake
        self._remember = remember

    @property
    def placement(self) -> Placement:
        """What was decided last."""
        return self._keeper.placement

    async def drain(self, replica: str) -> Drained:
        """See :meth:`Keeper.drain`."""
        return await self._keeper.drain(replica)

    async def allow(self, minimum: int, maximum: int) -> Placement:
        """Take other bounds; the pool follows within a second.

        Raises
        ------
        InvalidInput
            The minimum is none, and nothing would wake the pool then.
        """
        if minimum == 0 and not self._can_wake:
            raise InvalidInput("min_replicas=0 needs edge=haproxy, which sees what wakes it")
        await asyncio.to_thread(self._remember, minimum, maximum)
        bounds = dataclasses.replace(self._keeper.bounds, minimum=minimum, maximum=maximum)
        self._keeper.allow(bounds)
        return dataclasses.replace(self._keeper.placement, bounds=bounds)
