"""Doors of living replicas, by place: asked for only when something changed, never two at one place."""

from __future__ import annotations

from flatshare.pool.details import DoorAddress, ReplicaState
from flatshare.pool.doors import ASK_AGAIN_AFTER, Doors


class World:
    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.silent: set[str] = set()
        self.asked = 0
        self.doors = Doors(self.ask)

    def ask(self) -> list[DoorAddress]:
        self.asked += 1
        return [self.door(name) for name in self.places if name not in self.silent]

    def door(self, name: str) -> DoorAddress:
        return DoorAddress(name, "127.0.0.1", 4000 + int(name[1:]), self.places[name])

    def look(self, **states: str) -> list[str]:
        found = self.doors.of([ReplicaState(name, state, "") for name, state in states.items()])
        return [one.replica for one in found]


def test_replicas_are_asked_once_while_nothing_changes() -> None:
    world = World()
    world.places = {"r0": 0, "r1": 1}
    for _ in range(5):
        assert world.look(r0="RUNNING", r1="RUNNING") == ["r0", "r1"]
    assert world.asked == 1


def test_one_that_updates_stays_and_one_that_stops_goes() -> None:
    world = World()
    world.places = {"r0": 0, "r1": 1}
    world.look(r0="RUNNING", r1="RUNNING")
    assert world.look(r0="UPDATING", r1="STOPPING") == ["r0"]


def test_one_that_starts_is_not_named_before_it_runs_and_answers() -> None:
    world = World()
    world.places = {"r0": 0, "r1": 1}
    world.silent = {"r1"}
    assert world.look(r0="RUNNING", r1="STARTING") == ["r0"]
    assert world.look(r0="RUNNING", r1="RUNNING") == ["r0"]
    world.silent = set()
    assert world.look(r0="RUNNING", r1="RUNNING") == ["r0", "r1"]


def test_a_replacement_takes_over_the_place() -> None:
    world = World()
    world.places = {"r0": 0, "r1": 1, "r2": 2}
    world.look(r0="RUNNING", r1="RUNNING", r2="RUNNING")
    world.places = {"r0": 0, "r3": 1, "r2": 2}
    assert world.look(r0="RUNNING", r2="RUNNING", r3="RUNNING") == ["r0", "r3", "r2"]


def test_places_that_serve_gave_anew_are_heard_of() -> None:
    """When a pool shrinks, Serve makes the ranks contiguous a moment later."""
    world = World()
    world.places = {"r0": 0, "r1": 1, "r2": 2}
    world.look(r0="RUNNING", r1="RUNNING", r2="RUNNING")
    assert [
        one.place for one in world.doors.of([ReplicaState(name, "RUNNING", "") for name in ("r0", "r2")])
    ] == [0, 2]
    world.places = {"r0": 0, "r2": 1}
    assert [
        one.place for one in world.doors.of([ReplicaState(name, "RUNNING", "") for name in ("r0", "r2")])
    ] == [0, 1]


def test_two_that_claim_one_place_are_not_both_named() -> None:
    world = World()
    world.places = {"r0": 0}
    world.look(r0="RUNNING")
    world.places = {"r1": 0, "r0": 0}
    assert world.look(r0="RUNNING", r1="RUNNING") == ["r0"]
    world.places = {"r1": 1, "r0": 0}
    assert world.look(r0="RUNNING", r1="RUNNING") == ["r0", "r1"]


def test_one_that_is_drained_gets_nothing_and_comes_back_if_it_is_not() -> None:
    world = World()
    world.places = {"r0": 0, "r1": 1}
    states = [ReplicaState(name, "RUNNING", "") for name in ("r0", "r1")]
    assert [one.replica for one in world.doors.of(states, {"r1"})] == ["r0"]
    assert [one.replica for one in world.doors.of(states)] == ["r0", "r1"]
    assert world.asked == 1


def test_places_are_asked_for_again_now_and_then() -> None:
    world = World()
    world.places = {"r0": 0, "r1": 1}
    world.look(r0="RUNNING", r1="RUNNING")
    world.places = {"r0": 1, "r1": 0}
    for _ in range(ASK_AGAIN_AFTER):
        world.look(r0="RUNNING", r1="RUNNING")
    assert world.look(r0="RUNNING", r1="RUNNING") == ["r1", "r0"]
