"""The keeper: copies are told once they are loaded, replicas change within bounds, what goes is handed over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

import pytest

from flatshare.control import keeper as keeper_module
from flatshare.control.keeper import Keeper
from flatshare.errors import FleetUnavailable
from flatshare.placement.load import Held, ReplicaLoad
from flatshare.placement.ring import Ring
from flatshare.placement.scaling import Bounds
from flatshare_registry.errors import InvalidInput, NotFound, Unavailable


class World:
    """A fleet and a Serve that do what they are told."""

    def __init__(self, replicas: int, bounds: Bounds | None = None) -> None:
        self.names = [f"r{place}" for place in range(replicas)]
        self.ongoing: dict[str, float] = {}
        self.rate = 0.0
        self.idle_s = 0.0
        self.refuse: set[str] = set()
        self.silent = self.serve_down = False
        self.warmed: list[Mapping[str, Sequence[str]]] = []
        self.told: list[int] = []
        self.ended: list[str] = []
        self.held_models: dict[str, list[str]] = {}
        self.rates: list[float] = []
        self.popular: list[dict[str, float]] = []
        self.also: dict[str, list[str]] = {}
        self.now = -1000.0  # it was made long ago
        self.keeper = Keeper(self, self, bounds or Bounds(replicas, replicas), 4.0, lambda: self.now)
        self.now = 0.0

    # -- the fleet

    async def loads(self) -> list[ReplicaLoad]:
        if self.silent or not self.names:
            raise FleetUnavailable("nobody")
        share = {ref: ongoing / len(self.names) for ref, ongoing in self.ongoing.items()}
        return [
            ReplicaLoad(
                name, place, sum(share.values()), 0,
                self.rates[place] if self.rates else self.rate / len(self.names), self.idle_s, share,
                self.popular[place] if self.popular else {}, self.also,
            )
            for place, name in enumerate(self.names)
        ]  # fmt: skip

    async def held(self) -> list[Held]:
        return [
            Held(name, place, 30, self.held_models.get(name, [])) for place, name in enumerate(self.names)
        ]

    async def warm(self, wanted: Mapping[str, Sequence[str]], within_s: float) -> dict[str, list[str]]:
        self.warmed.append(wanted)
        return {name: list(refs) for name, refs in wanted.items() if name not in self.refuse}

    # -- Serve

    def wanted(self) -> int:
        if self.serve_down:
            raise Unavailable("controller")
        return len(self.names)

    def scale(self, replicas: int) -> None:
        self.told.append(replicas)
        self.names = self.names[:replicas] + [f"r{place}" for place in range(len(self.names), replicas)]

    def end(self, replica: str) -> None:
        if self.serve_down:
            raise Unavailable("controller")
        self.ended.append(replica)

    def newest(self) -> str | None:
        return self.names[-1] if self.names else None

    async def seconds(self, count: int) -> None:
        for _ in range(count):
            await self.keeper.tick()
            self.now += 1


async def test_a_hot_model_is_loaded_where_it_gets_copies_before_anybody_is_told() -> None:
    world = World(4)
    world.ongoing = {"acme": 12}
    homes = Ring(range(4)).homes("acme", 3)
    world.refuse = {f"r{homes[2]}"}
    await world.seconds(1)
    assert world.keeper.placement.copies == {"acme": tuple(homes[:2])}
    assert {name for wanted in world.warmed for name in wanted} == {f"r{place}" for place in homes}
    world.refuse = set()
    await world.seconds(10)
    assert world.keeper.placement.copies == {"acme": tuple(homes)}
    assert dict(world.warmed[-1]) == {f"r{homes[2]}": ["acme"]}, "only what was missing is asked for again"
    await world.seconds(3)
    assert len(world.warmed) == 2


async def test_when_no_copy_could_be_loaded_its_home_goes_on_alone() -> None:
    world = World(2)
    world.ongoing = {"acme": 12}
    world.refuse = {"r0", "r1"}
    await world.seconds(2)
    assert world.keeper.placement.copies == {}


async def test_copies_go_when_it_cools() -> None:
    world = World(2)
    world.ongoing = {"acme": 12}
    await world.seconds(2)
    world.ongoing = {}
    await world.seconds(12)
    assert world.keeper.placement.copies == {}


async def test_the_pool_grows_and_shrinks_with_the_load_and_goes_to_zero() -> None:
    world = World(1, Bounds(0, 4, 4.0, 8.0, 2, 5, 10))
    world.ongoing, world.rate = {"acme": 14}, 100
    await world.seconds(4)
    assert world.told == [4]
    world.ongoing, world.rate, world.idle_s = {}, 45, 0.01
    await world.seconds(10)
    assert world.told == [4, 1]
    world.rate, world.idle_s = 0, 11
    await world.seconds(12)
    assert world.told == [4, 1, 0]
    await world.seconds(20)
    assert world.told == [4, 1, 0]


async def test_a_request_at_zero_wakes_it_and_the_start_is_waited_for() -> None:
    world = World(1, Bounds(0, 4, idle_s=10))
    world.idle_s = 11
    await world.seconds(1)
    assert world.told == [0]
    world.keeper.wake(3)
    world.silent = True  # it starts
    await world.seconds(30)
    assert world.told == [0, 1]


async def test_fixed_bounds_change_nothing_and_other_ones_count_at_once() -> None:
    world = World(2)
    world.ongoing, world.rate = {"acme": 50}, 100
    await world.seconds(5)
    assert world.told == []
    world.keeper.allow(Bounds(3, 3))
    await world.seconds(1)
    assert world.told == [3]


async def test_who_goes_hands_over_what_it_was_home_to() -> None:
    world = World(3)
    ring = Ring(range(3))
    models = [f"m{n}" for n in range(30)]
    world.held_models = {f"r{p}": [m for m in models if ring.home(m) == p] for p in range(3)}
    world.keeper.allow(Bounds(2, 2))
    await world.seconds(1)
    handed = {ref for refs in world.warmed[0].values() for ref in refs}
    assert handed == set(world.held_models["r2"]) and set(world.warmed[0]) <= {"r0", "r1"}
    assert world.told == [2]


async def test_while_serve_says_nothing_the_number_stays() -> None:
    world = World(1, Bounds(0, 4, idle_s=10))
    world.idle_s = 99
    world.serve_down = True
    await world.seconds(3)
    assert world.told == []
    world.serve_down = False
    await world.seconds(1)
    assert world.told == [0]


async def test_the_imbalance_is_the_busiest_over_the_mean() -> None:
    world = World(2)
    assert world.keeper.placement.imbalance is None
    world.rate = 30
    await world.seconds(1)
    assert world.keeper.placement.imbalance == 1.0


async def test_it_goes_on_after_a_tick_that_failed_and_a_bell_does_not_wait() -> None:
    world = World(1)
    asked = asyncio.Event()
    first = True

    async def loads() -> list[ReplicaLoad]:
        nonlocal first
        if first:
            first = False
            world.keeper.wake(1)
            raise RuntimeError("odd")
        asked.set()
        return []

    world.loads = loads  # type: ignore[method-assign]
    running = asyncio.create_task(world.keeper.run())
    await asyncio.wait_for(asked.wait(), 0.9)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_a_pool_that_has_just_started_has_not_been_idle_for_long() -> None:
    world = World(1, Bounds(0, 4, idle_s=10))
    world.keeper = Keeper(world, world, world.keeper.bounds, 4.0, lambda: world.now)
    world.idle_s = 99
    await world.seconds(10)
    assert world.told == []
    await world.seconds(1)
    assert world.told == [0]


async def test_a_fleet_that_does_not_answer_is_not_one_that_has_nothing_to_do() -> None:
    """One replica that hangs makes a broadcast fail as a whole."""
    world = World(3, Bounds(0, 4, 4.0, 8.0, 2, 5, 10))
    world.ongoing, world.rate = {"acme": 9}, 100
    await world.seconds(20)
    world.silent = True
    await world.seconds(60)
    assert world.told == []
    world.silent, world.ongoing, world.rate, world.idle_s = False, {}, 0, 99
    await world.seconds(12)
    assert world.told[-1] == 0


async def test_what_an_operator_says_during_a_hand_over_counts() -> None:
    world = World(3)
    world.keeper.allow(Bounds(2, 2))

    async def warm(wanted: Mapping[str, Sequence[str]], within_s: float) -> dict[str, list[str]]:
        world.keeper.allow(Bounds(3, 3))
        return {}

    ring = Ring(range(3))
    models = [f"m{n}" for n in range(30)]
    world.held_models = {f"r{p}": [m for m in models if ring.home(m) == p] for p in range(3)}
    world.warm = warm  # type: ignore[method-assign]
    await world.seconds(2)
    assert world.told == []


async def test_a_copy_that_can_not_be_loaded_is_not_asked_for_at_every_tick() -> None:
    world = World(2)
    world.ongoing = {"acme": 12}
    world.refuse = {"r0", "r1"}
    await world.seconds(9)
    assert len(world.warmed) == 1
    await world.seconds(3)
    assert len(world.warmed) == 2


async def test_a_replacement_loads_a_copy_before_it_counts_again() -> None:
    world = World(2)
    world.ongoing = {"acme": 12}
    await world.seconds(1)
    assert set(world.keeper.placement.copies["acme"]) == {0, 1}
    world.names[1] = "new"
    world.refuse = {"new"}
    await world.seconds(1)
    assert world.keeper.placement.copies == {}


async def test_a_replacement_loads_what_the_killed_one_held() -> None:
    """Nobody else holds it, and an idle fleet has no requests that would bring it back."""
    world = World(3)
    ring = Ring(range(3))
    models = [f"m{n}" for n in range(30)]
    mine = {f"r{p}": [m for m in models if ring.home(m) == p] for p in range(3)}
    world.held_models = dict(mine)
    await world.seconds(keeper_module.HELD_TICKS)
    world.names[1] = "new"
    del world.held_models["r1"]
    await world.seconds(1)
    assert world.warmed == [{"new": mine["r1"]}]
    await world.seconds(int(keeper_module.REMEMBER_S) + keeper_module.HELD_TICKS)
    world.names[1] = "newer"
    world.held_models = {"r0": [], "r2": []}
    await world.seconds(1)
    assert len(world.warmed) == 1, "what nobody has held for a minute is forgotten"


async def test_other_refs_of_a_copied_or_moved_version_go_where_it_is() -> None:
    world = World(2)
    world.ongoing = {"acme": 12}
    world.also = {"acme": ["acme:canary", "acme@7"], "m1": ["m1@3"]}
    world.keeper.begin_with({"m1": 1, "acme:canary": 0})
    await world.seconds(1)
    copies = world.keeper.placement.copies["acme"]
    assert world.keeper.routes.models == {
        "acme": copies, "acme@7": copies, "acme:canary": (0,), "m1": (1,), "m1@3": (1,),
    }  # fmt: skip
    assert set(world.keeper.placement.copies) == {"acme"}, "one model is shown once"


async def test_a_popular_model_is_moved_once_it_is_loaded_and_remembered() -> None:
    world = World(2)
    remembered: list[Mapping[str, int]] = []
    world.keeper.remember_moved = remembered.append
    world.rates = [300.0, 100.0]
    world.popular = [{"m1": 80.0}, {}]
    await world.seconds(4)
    assert world.keeper.placement.moved == {"m1": 1} == remembered[-1]
    assert world.keeper.routes.models == {"m1": (1,)}
    assert {"r1": ["m1"]} in world.warmed


async def test_a_model_that_can_not_be_loaded_there_is_not_moved() -> None:
    world = World(2)
    world.rates, world.popular, world.refuse = [300.0, 100.0], [{"m1": 80.0}, {}], {"r1"}
    await world.seconds(8)
    assert world.keeper.placement.moved == {}
    world.keeper.begin_with({"m1": 0})
    await world.seconds(8)
    assert world.keeper.placement.moved == {"m1": 0}, "it stays where it was"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "EDGES_LOOK_S", 0.001)


@pytest.mark.usefixtures("quick")
async def test_a_replica_is_drained_once_others_hold_its_models_and_its_requests_have_ended() -> None:
    world = World(3)
    ring = Ring(range(3))
    models = [f"m{n}" for n in range(20)]
    world.held_models = {f"r{p}": [m for m in models if ring.home(m) == p] for p in range(3)}
    world.rates = [9.0, 9.0, 9.0]
    draining = asyncio.create_task(world.keeper.drain("r1"))
    while "r1" not in world.keeper.routes.draining:
        await asyncio.sleep(0)
    assert world.warmed and "r1" not in world.warmed[0] and not world.ended
    world.rates = [13.0, 0.0, 13.0]
    done = await draining
    assert world.ended == ["r1"] and done.handed_over == len(world.held_models["r1"])
    assert world.keeper.routes.draining == frozenset()


@pytest.mark.usefixtures("quick")
async def test_one_whose_requests_do_not_end_goes_on() -> None:
    world = World(2)
    world.rates = [9.0, 9.0]

    async def loads() -> list[ReplicaLoad]:
        world.now += 10
        return await World.loads(world)

    world.loads = loads  # type: ignore[method-assign]
    with pytest.raises(FleetUnavailable, match="goes on"):
        await world.keeper.drain("r1")
    assert world.ended == [] and world.keeper.routes.draining == frozenset()


@pytest.mark.usefixtures("quick")
async def test_what_can_not_be_drained_is_refused() -> None:
    with pytest.raises(NotFound, match="there is no replica r9"):
        await World(2).keeper.drain("r9")
    with pytest.raises(InvalidInput, match="the only replica"):
        await World(1).keeper.drain("r0")
    world = World(2)
    world.serve_down = True
    with pytest.raises(FleetUnavailable, match="could not be ended"):
        await world.keeper.drain("r1")
    assert world.keeper.routes.draining == frozenset()
