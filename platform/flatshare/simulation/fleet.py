"""A fleet over a trace: homes, moves, copies and the number of replicas decided as the fleet's keeper does.

Time goes in ticks. Within a tick, requests go to the homes that held at its beginning; at its end the
functions of ``placement/`` get what the replicas would have reported. Left out: queues (a request takes
no time, so nothing spills from a busy home to the next), bytes (each model takes a slot), and the time of a
load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flatshare.placement.balance import LEAST_RATE, MOVE_TICKS, RATE_SHARE, decide_moves, homes_of
from flatshare.placement.copies import Spread, decide_copies
from flatshare.placement.handover import to_load
from flatshare.placement.load import Held, ReplicaLoad
from flatshare.placement.ring import Ring, ring_keys, ring_of
from flatshare.placement.scaling import Bounds, Wish, decide_replicas, wish
from flatshare.simulation.cache import HostCache, SlotCache
from flatshare.simulation.trace import Trace

__all__ = ["Absence", "FleetSetup", "Simulated", "simulate"]

POPULAR = 8
"""Models that a replica tells of."""

FELT = 20
"""A model below ``1 / FELT`` of the target is ignored: it is far from needing a copy."""


@dataclass(frozen=True, slots=True)
class Absence:
    """Replicas that are away for a while; what comes back at their places begins with an empty device.

    Attributes
    ----------
    places
        Places of these replicas; the next homes answer meanwhile.
    host_lost
        Whether their nodes' host tiers are lost with them.
    """

    at_s: float
    for_s: float
    places: tuple[int, ...]
    host_lost: bool = False


@dataclass(frozen=True, slots=True)
class FleetSetup:
    """What is simulated.

    Attributes
    ----------
    replicas, slots
        Replicas at the beginning, and slots of each.
    policy
        Which model is evicted first: ``lru`` or ``sieve``.
    replicas_a_node, host_models
        Replicas that share a host tier, and models that fit into it.
    service_s
        Seconds that one request keeps its replica.
    weight
        Requests that each of the trace stands for when load is judged.
    target_ongoing_requests
        Of one model, beyond which it gets a copy; of one replica, to decide the number of replicas.
    bounds
        Fewest and most replicas; None: the number stays.
    tick_s
        Seconds between two decisions.
    absences
        Nodes lost, replicas replaced.
    warm_s
        Seconds from the beginning that count for nothing: all caches are empty then.
    """

    replicas: int
    slots: int
    policy: str = "lru"
    replicas_a_node: int = 8
    host_models: int = 1_700
    service_s: float = 0.001
    weight: float = 1.0
    target_ongoing_requests: float = 4.0
    bounds: Bounds | None = None
    tick_s: float = 1.0
    absences: tuple[Absence, ...] = ()
    warm_s: float = 0.0


@dataclass(slots=True)
class Simulated:
    """What came of it; counts are of the requests after ``warm_s``.

    Attributes
    ----------
    hits
        Requests that found their model on the device.
    store_loads
        Loads that no host tier had.
    duplicates
        Resident models over distinct models, one number a tick.
    moved
        Models that were given a home other than the ring's.
    rehomed
        Share of the trace's models whose home changed, for each change of the set of replicas.
    replicas
        One number a tick.
    hit_rates
        One number a tick; NaN where nothing came.
    """

    requests: int = 0
    hits: int = 0
    store_loads: int = 0
    measured_s: float = 0.0
    duplicates: list[float] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    rehomed: list[float] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    hit_rates: list[float] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Share of requests that found their model on the device."""
        return self.hits / max(self.requests, 1)

    @property
    def duplicate_factor(self) -> float:
        """The mean over the ticks."""
        return float(np.mean(self.duplicates)) if self.duplicates else 1.0

    @property
    def store_requests_per_s(self) -> float:
        """Loads from the store a second."""
        return self.store_loads / self.measured_s if self.measured_s else 0.0


def simulate(
    trace: Trace, setup: FleetSetup, progress: Callable[[float], None] = lambda share: None
) -> Simulated:
    """Run a trace through a fleet.

    Parameters
    ----------
    progress
        Called with the share of the trace that is done.
    """
    fleet = _Fleet(trace, setup)
    ends = np.arange(1, math.ceil((trace.at_s[-1] + 1e-9) / setup.tick_s) + 1) * setup.tick_s
    edges = np.searchsorted(trace.at_s, ends)
    start = 0
    for number, (end, end_s) in enumerate(zip(edges.tolist(), ends.tolist(), strict=True)):
        fleet.tick(end_s - setup.tick_s, start, end)
        start = end
        if number % 16 == 0:
            progress(end / len(trace))
    progress(1.0)
    return fleet.result


class _Fleet:
    def __init__(self, trace: Trace, setup: FleetSetup) -> None:
        self.result = Simulated()
        self._trace = trace
        self._setup = setup
        self._keys = ring_keys(trace.names)
        self._index = {name: number for number, name in enumerate(trace.names)}
        self._wanted = setup.replicas
        self._caches = {place: SlotCache(setup.slots, setup.policy) for place in range(setup.replicas)}
        self._hosts: dict[int, HostCache] = {}
        self._away: dict[int, float] = {}
        self._last_held: dict[int, Held] = {}
        self._moved: dict[str, int] = {}
        self._spreads: dict[str, Spread] = {}
        self._rates: dict[int, float] = {}
        self._wishes: tuple[Wish, ...] = ()
        self._steady = 0
        self._absences = sorted(setup.absences, key=lambda one: one.at_s)
        self._now = 0.0
        self._homes = self._homes_now()

    # -- one tick

    def tick(self, now: float, start: int, end: int) -> None:
        """Requests ``start`` to ``end`` of the trace, then what is decided after them."""
        self._now = now
        self._come_and_go(now)
        models = self._trace.models[start:end]
        places = self._places(models)
        hits = self._serve(models, places)
        counted = now >= self._setup.warm_s
        if counted:
            self.result.requests += len(models)
            self.result.hits += hits
            self.result.measured_s += self._setup.tick_s
            self.result.duplicates.append(self._duplicate_factor())
        self.result.replicas.append(len(self._caches))
        self.result.hit_rates.append(hits / len(models) if len(models) else math.nan)
        self._decide(now + self._setup.tick_s, self._loads(models, places))

    def _serve(self, models: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> int:
        """Serve a tick's requests, replica by replica, each in their order."""
        order = np.argsort(places, kind="stable")
        bounds = np.flatnonzero(np.diff(places[order])) + 1
        hits, loads = 0, 0
        for part in np.split(order, bounds):
            if not len(part):
                continue
            place = int(places[part[0]])
            ask, host = self._caches[place].ask, self._host_of(place)
            for model in models[part].tolist():
                if ask(model, self._now):
                    hits += 1
                elif not host.ask(model):
                    loads += 1
        if self.result.measured_s > 0 or self._setup.warm_s == 0:
            self.result.store_loads += loads
        return hits

    def _places(self, models: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        places = self._homes[models]
        for name, spread in self._spreads.items():
            living = [place for place in spread.places if place in self._caches]
            mine = np.flatnonzero(models == self._index[name])
            if living:
                places[mine] = np.array(living)[np.arange(len(mine)) % len(living)]
        return places

    def _loads(self, models: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> list[ReplicaLoad]:
        """What replicas would have told of this tick."""
        setup, names = self._setup, self._trace.names
        each_s = setup.weight / setup.tick_s
        totals = np.bincount(places, minlength=max(self._caches, default=0) + 1) * each_s
        pairs, counts = np.unique(places * len(names) + models, return_counts=True)
        ongoing = counts * (each_s * setup.service_s)
        felt: dict[int, dict[str, float]] = {}
        for pair in np.flatnonzero(ongoing > setup.target_ongoing_requests / FELT).tolist():
            place, model = divmod(int(pairs[pair]), len(names))
            felt.setdefault(place, {})[names[model]] = float(ongoing[pair])
        moves = (self._steady + 1) % MOVE_TICKS == 0
        found: list[ReplicaLoad] = []
        for place, cache in self._caches.items():
            popular = cache.popular(POPULAR, self._now + setup.tick_s) if moves else ()
            rate = float(totals[place])
            found.append(
                ReplicaLoad(
                    str(place), place, rate * setup.service_s, 0.0, rate, 0.0 if rate else math.inf,
                    felt.get(place, {}), {names[model]: one * setup.weight for one, model in popular},
                )
            )  # fmt: skip
        return found

    # -- decisions

    def _decide(self, now: float, loads: Sequence[ReplicaLoad]) -> None:
        self._keep_balance(loads)
        self._spreads = decide_copies(
            now, loads, self._spreads, self._setup.target_ongoing_requests, self._moved
        )
        bounds = self._setup.bounds
        if bounds is None:
            return
        self._wishes = (*self._wishes, wish(now, loads, bounds))
        wanted, self._wishes = decide_replicas(now, self._wanted, self._wishes, bounds)
        if wanted != self._wanted:
            held = self._held()
            for place in range(wanted, self._wanted):
                self._caches.pop(place, None)
            for place in range(self._wanted, wanted):
                self._caches[place] = SlotCache(self._setup.slots, self._setup.policy)
            one_goes = wanted == self._wanted - 1
            self._wanted, self._wishes = wanted, ()
            self._set_changed(held, [], warm=one_goes or len(held) <= wanted)

    def _keep_balance(self, loads: Sequence[ReplicaLoad]) -> None:
        rates = {load.place: load.requests_per_s for load in loads}
        if set(rates) != set(self._rates):
            self._rates, self._steady = rates, 0
            return
        share = 1 - (1 - RATE_SHARE) ** self._setup.tick_s
        self._rates = {
            place: share * rate + (1 - share) * self._rates[place] for place, rate in rates.items()
        }
        self._steady += 1
        if self._steady % MOVE_TICKS or sum(self._rates.values()) < LEAST_RATE:
            return
        moved = decide_moves(loads, self._rates, self._moved)
        new = {name: place for name, place in moved.items() if self._moved.get(name) != place}
        self._moved = moved
        self.result.moved |= set(new)
        for name, place in new.items():
            self._caches[place].ask(self._index[name], self._now)  # loaded there before it is told to edges
            self._homes[self._index[name]] = place

    def _come_and_go(self, now: float) -> None:
        held = None
        while self._absences and self._absences[0].at_s <= now:
            one = self._absences.pop(0)
            held = held if held is not None else self._held()
            for place in one.places:
                if place in self._caches:
                    self._last_held[place] = Held(
                        str(place), place, self._setup.slots, self._names_of(self._caches.pop(place).models)
                    )
                    self._away[place] = now + one.for_s
                    if one.host_lost:
                        self._hosts.pop(place // self._setup.replicas_a_node, None)
        back = [place for place, until in self._away.items() if until <= now]
        if held is None and not back:
            return
        held = held if held is not None else self._held()
        gone = [self._last_held[place] for place in back]
        for place in back:
            del self._away[place]
            self._caches[place] = SlotCache(self._setup.slots, self._setup.policy)
        self._set_changed([one for one in held if one.place in self._caches], gone, warm=True)

    def _set_changed(self, held: Sequence[Held], gone: Sequence[Held], *, warm: bool) -> None:
        """Compute homes anew; load models whose home has changed into it, as far as there is room."""
        before, self._homes = self._homes, self._homes_now()
        self.result.rehomed.append(float(np.mean(before != self._homes)))
        if not warm:
            return
        names = {place: str(place) for place in sorted(self._caches)}
        for name, refs in to_load(held, names, self._moved, gone).items():
            self._caches[int(name)].preload((self._index[ref] for ref in refs), self._now)

    def _homes_now(self) -> npt.NDArray[np.int64]:
        ring: Ring = ring_of(self._caches)
        homes = ring.home_of_each(self._keys)
        for name in self._moved:
            homes[self._index[name]] = homes_of(ring, self._moved, name, 1)[0]
        return homes

    # -- looking

    def _held(self) -> list[Held]:
        slots = self._setup.slots
        return [
            Held(str(place), place, slots, self._names_of(cache.models))
            for place, cache in self._caches.items()
        ]

    def _names_of(self, models: Sequence[int]) -> list[str]:
        return [self._trace.names[model] for model in models]

    def _host_of(self, place: int) -> HostCache:
        node = place // self._setup.replicas_a_node
        if node not in self._hosts:
            self._hosts[node] = HostCache(self._setup.host_models)
        return self._hosts[node]

    def _duplicate_factor(self) -> float:
        total = sum(map(len, self._caches.values()))
        distinct: set[int] = set()
        for cache in self._caches.values():
            distinct.update(cache.models)
        return total / len(distinct) if distinct else 1.0
