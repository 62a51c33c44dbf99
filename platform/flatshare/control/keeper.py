"""Keeps the fleet in shape: once a second it decides homes, copies and the number of replicas.

It runs in the control plane. It remembers little, and a new one learns the rest from the replicas: a control
plane that dies costs the fleet nothing but the decisions of these seconds. What it decides is worked out in
``placement/``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flatshare.control.decided import AsksFleet, Drained, Placement, Routes, Scaler
from flatshare.errors import FleetUnavailable
from flatshare.placement.balance import LEAST_RATE, MOVE_TICKS, RATE_SHARE, decide_moves
from flatshare.placement.copies import Spread, decide_copies
from flatshare.placement.handover import after_loss, to_load
from flatshare.placement.load import Held, ReplicaLoad
from flatshare.placement.scaling import Bounds, Wish, decide_replicas, wish
from flatshare.settings import Settings
from flatshare_registry.errors import InvalidInput, NotFound, Unavailable

__all__ = ["Keeper"]

logger = logging.getLogger("flatshare.control")

TICK_S: Final = 1.0
DRAIN_S: Final = 40.0
"""Seconds that a replica has to end its requests: more than one may take."""

HELD_TICKS: Final = 5
"""Ticks between two questions about what replicas hold: a killed replica can't be asked any more."""

REMEMBER_S: Final = 60.0
"""Seconds for which the keeper remembers what a lost replica held: longer than a replacement takes."""

EDGES_LOOK_S: Final = 1.0
"""Seconds between two questions to a replica that is drained: edges look twice in that time."""

RETRY_COPY_S: Final = 10.0
"""Seconds until a replica that could not load a copy is asked again."""

WARM_S: Final = 5.0
"""Seconds that replicas have to load copies, or what a replica that goes leaves behind."""


@dataclass(slots=True, eq=False)
class Keeper:  # numpydoc ignore=PR02
    """Decides, and has its decisions carried out. All methods must be called on one event loop.

    Parameters
    ----------
    bounds
        What the operator allows; :meth:`allow` changes it.
    copies_target
        Requests under way of one model that one replica should have.
    """

    fleet: AsksFleet
    scaler: Scaler
    bounds: Bounds
    copies_target: float
    clock: Callable[[], float] = time.monotonic
    _spreads: dict[str, Spread] = field(default_factory=dict)
    _copies: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _not_before: dict[tuple[str, str], float] = field(default_factory=dict)
    _wishes: tuple[Wish, ...] = ()
    _wanted: int | None = None
    _waiting: int = 0
    _asked_at: float = 0.0
    _loads: Sequence[ReplicaLoad] = ()
    _names: Mapping[int, str] = field(default_factory=dict)
    _also: dict[str, Sequence[str]] = field(default_factory=dict)
    _held: dict[str, tuple[float, Held]] = field(default_factory=dict)
    _looks: int = 0
    _steady: int = 0
    _rates: dict[int, float] = field(default_factory=dict)
    _moved: dict[str, int] = field(default_factory=dict)
    remember_moved: Callable[[Mapping[str, int]], None] = lambda _: None
    _draining: set[str] = field(default_factory=set)
    _bell: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        # Requests are about to come to a pool that has just started: it has not been idle for long.
        self._asked_at = self.clock()

    @property
    def placement(self) -> Placement:
        """What was decided last."""
        latest = self._wishes[-1].replicas if self._wishes else None
        rates = [load.requests_per_s for load in self._loads]
        imbalance = max(rates) * len(rates) / sum(rates) if sum(rates) > 0 else None
        return Placement(dict(self._copies), self.bounds, self._wanted, latest, imbalance, dict(self._moved))

    @property
    def routes(self) -> Routes:
        """What edges must know beside the ring."""
        found = {ref: (place,) for ref, place in self._moved.items()} | self._copies
        for ref in tuple(found):
            # Other refs of the same version go where the model is; elsewhere it would be of no use to them.
            found |= {other: found[ref] for other in self._also.get(ref, ()) if other not in found}
        return Routes(found, frozenset(self._draining))

    async def drain(self, replica: str) -> Drained:
        """Empty a replica and have it replaced: others load what it holds, edges leave it out, then it ends.

        Raises
        ------
        NotFound
            There is no such replica.
        InvalidInput
            It is the only one, so nobody could take its requests.
        FleetUnavailable
            Its requests did not end in time, and it goes on; or Serve can't end it.
        """
        held = await self.fleet.held()
        names = {one.place: one.replica for one in held}
        if replica not in names.values():
            raise NotFound(f"there is no replica {replica}; flatshare replicas lists them")
        if len(names) == 1:
            raise InvalidInput(f"{replica} is the only replica; flatshare scale 2 first")
        others = {place: name for place, name in names.items() if name != replica}
        wanted = to_load(held, others, self._moved)
        ready = await self._warm(wanted)
        began = self.clock()
        self._draining.add(replica)
        try:
            await self._until_idle(replica, began + DRAIN_S)
            waited_s = self.clock() - began
            await asyncio.to_thread(self.scaler.end, replica)
        except Unavailable as error:
            raise FleetUnavailable(
                f"{replica} was emptied and could not be ended: {error.message}"
            ) from error
        finally:
            self._draining.discard(replica)  # a replacement has another name
        return Drained(replica, sum(map(len, ready.values())), waited_s)

    async def _until_idle(self, replica: str, deadline: float) -> None:
        """Until a replica has had no request for two looks of the edges."""
        while self.clock() < deadline:
            await asyncio.sleep(EDGES_LOOK_S)  # edges ask on their own; nobody tells when they have
            loads = {load.replica: load for load in await self.fleet.loads()}
            load = loads.get(replica)
            if load is None or (load.ongoing == 0 and load.loading == 0 and load.requests_per_s == 0):
                return
        raise FleetUnavailable(f"{replica} still had requests after {DRAIN_S:g} s, and goes on")

    def begin_with(self, moved: Mapping[str, int]) -> None:
        """Take over what a keeper before this one had moved."""
        self._moved = dict(moved)

    def allow(self, bounds: Bounds) -> None:
        """Take other bounds, at once."""
        self.bounds = bounds
        self._wishes = ()
        self._bell.set()

    def take_settings(self, settings: Settings) -> None:
        """Decide by other targets and delays from now on."""
        self.copies_target = settings.target_ongoing_requests
        self.allow(
            dataclasses.replace(
                self.bounds,
                target_ongoing_requests=settings.target_ongoing_requests,
                upscale_delay_s=settings.upscale_delay_s,
                downscale_delay_s=settings.downscale_delay_s,
                idle_s=settings.downscale_to_zero_delay_s,
            )
        )

    def wake(self, waiting: int) -> None:
        """Note that ``waiting`` requests wait for a pool without a replica."""
        self._waiting = max(waiting, 1)
        self._asked_at = self.clock()
        self._bell.set()

    async def run(self) -> None:
        """Decide once a second until cancelled. What fails is logged and tried again."""
        while True:
            try:
                await self.tick()
            except Exception:
                logger.exception("the fleet was not looked at")
            try:
                async with asyncio.timeout(TICK_S):
                    await self._bell.wait()
            except TimeoutError:
                pass
            self._bell.clear()

    async def tick(self) -> None:
        """Decide once, and do it."""
        try:
            loads = await self.fleet.loads()
        except FleetUnavailable:
            loads = []  # there is no replica, or all are busy starting
        self._loads = loads
        if loads:
            idle_s = min(load.idle_s for load in loads)
            asking = any(load.requests_per_s > 0 for load in loads)
            self._asked_at = max(self._asked_at, self.clock() - (0.0 if asking else idle_s))
        if loads:
            self._also = {ref: others for load in loads for ref, others in load.also.items()}
            await self._follow({load.place: load.replica for load in loads})
            await self._balance(loads)
            await self._keep_copies(loads)
            self._looks += 1
            if self._looks % HELD_TICKS == 0:
                await self._ask_held()
        await self._keep_replicas(loads)

    async def _keep_copies(self, loads: Sequence[ReplicaLoad]) -> None:
        """A copy is told to edges once its replica holds the model."""
        names = {load.place: load.replica for load in loads}
        self._spreads = decide_copies(self.clock(), loads, self._spreads, self.copies_target, self._moved)
        wanted: dict[str, list[str]] = {}
        for model_ref, spread in self._spreads.items():
            for place in spread.places:
                again_at = self._not_before.get((model_ref, names[place]), 0.0)
                if place not in self._copies.get(model_ref, ()) and self.clock() >= again_at:
                    wanted.setdefault(names[place], []).append(model_ref)
        ready = await self._warm(wanted)
        self._not_before = {
            key: at for key, at in self._not_before.items() if at > self.clock() and key[0] in self._spreads
        }
        for name, refs in wanted.items():
            for model_ref in set(refs).difference(ready.get(name, ())):
                # It has no room there, or the store is slow. Not asked at every tick: the tick waits for it.
                self._not_before[model_ref, name] = self.clock() + RETRY_COPY_S
        found: dict[str, tuple[int, ...]] = {}
        for model_ref, spread in self._spreads.items():
            told = self._copies.get(model_ref, ())
            places = tuple(
                place for place in spread.places if place in told or model_ref in ready.get(names[place], ())
            )
            if len(places) > 1:
                found[model_ref] = places
        if found != self._copies:
            logger.info("copies: %s", found)
        self._copies = found

    async def _balance(self, loads: Sequence[ReplicaLoad]) -> None:
        """Move one popular model from the busiest replica to the calmest, when they are far apart."""
        rates = {load.place: load.requests_per_s for load in loads}
        if set(rates) != set(self._rates):
            self._rates, self._steady = rates, 0  # counted anew: a replica came or went
            return
        self._rates = {
            place: RATE_SHARE * rate + (1 - RATE_SHARE) * self._rates[place] for place, rate in rates.items()
        }
        self._steady += 1
        if self._steady % MOVE_TICKS or sum(self._rates.values()) < LEAST_RATE:
            return
        moved = decide_moves(loads, self._rates, self._moved)
        names = {load.place: load.replica for load in loads}
        new = {ref: place for ref, place in moved.items() if self._moved.get(ref) != place}
        ready = await self._warm({names[place]: [ref] for ref, place in new.items()})
        for ref, place in new.items():
            if ref not in ready.get(names[place], ()):
                moved.pop(ref)
                if ref in self._moved:  # it stays where it was
                    moved[ref] = self._moved[ref]
        if moved != self._moved:
            logger.info("moved: %s", new)
            self._moved = moved
            await asyncio.to_thread(self.remember_moved, moved)

    async def _follow(self, names: Mapping[int, str]) -> None:
        """Load models whose home has changed into the new home, before more requests find it cold."""
        before, self._names = self._names, names
        if not before or before == names:
            return
        # Another replica at a place does not hold what the last one did: it loads copies before they count.
        same = {place for place, name in names.items() if before.get(place) == name}
        self._copies = {
            ref: tuple(place for place in places if place in same) for ref, places in self._copies.items()
        }
        await self._ask_held()
        living = [held for name, (_, held) in self._held.items() if name in names.values()]
        gone = [held for name, (_, held) in self._held.items() if name not in names.values()]
        await self._warm(to_load(living, names, self._moved, gone))

    async def _ask_held(self) -> None:
        """Note what replicas hold; remember for a while what a lost replica held."""
        now = self.clock()
        try:
            new = {held.replica: (now, held) for held in await self.fleet.held()}
        except FleetUnavailable as error:
            logger.warning("replicas did not say what they hold: %s", error.message)
            new = {}
        self._held = new | {
            name: known
            for name, known in self._held.items()
            if name not in new and now - known[0] < REMEMBER_S
        }

    async def _keep_replicas(self, loads: Sequence[ReplicaLoad]) -> None:
        now = self.clock()
        waiting = 0 if loads else self._waiting
        self._waiting = 0
        self._wishes = (*self._wishes, wish(now, loads, self.bounds, waiting, now - self._asked_at))
        try:
            current = self._wanted = await asyncio.to_thread(self.scaler.wanted)
            bounds = self.bounds
            replicas, self._wishes = decide_replicas(now, current, self._wishes, bounds)
            if not loads and current > 0:
                # No replica answered. That says nothing about load: one that hangs makes all of them silent.
                replicas = max(replicas, bounds.clamped(current))
            if replicas == current:
                return
            if replicas < current:
                await self._hand_over(current - replicas, current)
                if self.bounds is not bounds:
                    return  # the operator said otherwise meanwhile
            logger.warning(
                "the pool has %d replicas and gets %d: %s", current, replicas, _why(loads, waiting)
            )
            await asyncio.to_thread(self.scaler.scale, replicas)
            self._wanted = replicas
            self._wishes = ()
        except Unavailable as error:
            logger.warning("the number of replicas stays: %s", error.message)

    async def _hand_over(self, count: int, current: int) -> None:
        """Have the others load what a leaving replica was home to. Serve stops the newest one first."""
        leaving = await asyncio.to_thread(self.scaler.newest)
        if leaving is None or count > 1:  # more than one at a time: what they held comes on demand
            return
        try:
            held = await self.fleet.held()
            if len(held) != current:
                return  # the places after it would be guessed
            names = after_loss({one.place: one.replica for one in held}, leaving)
            if names:
                await self._warm(to_load(held, names, self._moved))
        except FleetUnavailable as error:
            logger.warning("%s goes without handing over: %s", leaving, error.message)

    async def _warm(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        if not wanted:
            return {}
        try:
            return await self.fleet.warm(wanted, WARM_S)
        except FleetUnavailable as error:
            logger.warning("models were not loaded in advance: %s", error.message)
            return {}


def _why(loads: Sequence[ReplicaLoad], waiting: int) -> str:
    ongoing = sum(load.ongoing for load in loads)
    loading = sum(load.loading for load in loads)
    rate = sum(load.requests_per_s for load in loads)
    return (
        f"{ongoing:.1f} requests under way, {loading:.1f} wait for loads, {waiting} wait for a replica, "
        f"{rate:.0f} requests/s"
    )
