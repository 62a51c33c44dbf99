"""A node is drained once others hold its models; what can't be is refused before Ray is told, which is for good."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from flatshare.control import nodes as nodes_module
from flatshare.control.nodes import NodeDrain
from flatshare.errors import FleetUnavailable
from flatshare.placement.load import Held, ReplicaLoad
from flatshare.pool.details import ClusterNode, replicas_on
from flatshare.pool.handle import POOL_APP, POOL_DEPLOYMENT
from flatshare_registry.errors import InvalidInput, NotFound, Unavailable

HEAD, FULL, OTHER = "aaaa1111", "bbbb2222", "cccc3333"


class World:
    """A head, a node with r1 and r2, and one with room; what is told to leave does so when it is looked at."""

    def __init__(self, room: int = 2) -> None:
        self.room = room
        self.on = {
            FULL: [
                f"{POOL_APP}/{POOL_DEPLOYMENT}/r1",
                f"{POOL_APP}/{POOL_DEPLOYMENT}/r2",
                "tasks/Consumer/c1",
            ]
        }
        self.events: list[object] = []
        self.silent = self.deaf = False
        self.goes = True

    # -- the cluster

    def nodes(self) -> list[ClusterNode]:
        found = [
            ClusterNode(HEAD, "10.0.0.1", "host", True, 0),
            ClusterNode(FULL, "10.0.0.2", "host", False, 0, leaving=FULL in self.events),
            ClusterNode(OTHER, "10.0.0.3", "third", False, self.room, leaving=OTHER in self.events),
        ]
        return [one for one in found if not one.leaving or self.on.get(one.node_id)]

    def replicas(self, node_id: str) -> list[str]:
        left = self.on.get(node_id, [])
        if node_id in self.events and left and self.goes:
            left.pop()
        return list(left)

    def leave(self, node_id: str) -> None:
        if self.deaf:
            raise Unavailable("head")
        self.events.append(node_id)

    # -- the fleet

    async def loads(self) -> list[ReplicaLoad]:
        return []

    async def held(self) -> list[Held]:
        if self.silent:
            raise FleetUnavailable("nobody")
        return [Held("r0", 0, 9, ["a"]), Held("r1", 1, 9, ["b", "c"]), Held("r2", 2, 9, ["d"])]

    async def warm(self, wanted: Mapping[str, Sequence[str]], within_s: float) -> dict[str, list[str]]:
        self.events.append({name: sorted(refs) for name, refs in wanted.items()})
        return {name: list(refs) for name, refs in wanted.items()}


def drain_of(world: World) -> NodeDrain:
    return NodeDrain(world, world, dict, f"{POOL_APP}/{POOL_DEPLOYMENT}/")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "LOOK_S", 0.0)


@pytest.mark.parametrize("name", [FULL, "bbbb", "10.0.0.2"])
async def test_models_move_first_then_replicas(name: str) -> None:
    world = World()
    drain = drain_of(world)
    begun = await drain.drain(name)
    assert len(begun.left) == 2, "it answers before the control plane itself may have to move"
    done = await drain.drain(begun.node_id)
    assert world.events == [{"r0": ["b", "c", "d"]}, FULL]
    assert (done.node_id, done.address, done.handed_over, done.left) == (FULL, "10.0.0.2", 3, [])


async def test_one_that_takes_long_says_what_is_left_and_asking_again_goes_on() -> None:
    world = World()
    world.goes = False
    drain = drain_of(world)
    await drain.drain("10.0.0.2")
    first = await drain.drain("10.0.0.2", within_s=0.05)
    assert first.left == [
        f"{POOL_APP}/{POOL_DEPLOYMENT}/r1",
        f"{POOL_APP}/{POOL_DEPLOYMENT}/r2",
        "tasks/Consumer/c1",
    ]
    world.goes = True
    again, _ = await asyncio.gather(drain.drain(FULL), drain.drain(FULL))
    assert again.left == [] and again.handed_over == 3
    assert world.events == [{"r0": ["b", "c", "d"]}, FULL], "it was told once, and has left meanwhile"


async def test_a_new_control_plane_goes_on() -> None:
    world = World(room=2)
    await drain_of(world).drain("10.0.0.2")
    world.room = 0  # the replacements are placed already
    drain = drain_of(world)
    assert (await drain.drain("10.0.0.2")).left == []
    with pytest.raises(NotFound):
        await drain_of(world).drain("10.0.0.2")
    assert (await drain.drain(FULL)).left == [], "who has seen it go knows"
    with pytest.raises(NotFound):
        await drain.drain("10.0.0.2")  # that may be another node by now


async def test_what_can_not_be_drained_is_refused_before_anything_happens() -> None:
    world = World(room=1)
    with pytest.raises(NotFound, match=r"no replica and no node 10.0.0.9; nodes: 10.0.0.1 \(aaaa1111\)"):
        await drain_of(world).drain("10.0.0.9")
    with pytest.raises(InvalidInput, match="several nodes"):
        await drain_of(world).drain("host")
    with pytest.raises(InvalidInput, match="head"):
        await drain_of(world).drain("10.0.0.1")
    with pytest.raises(InvalidInput, match="has 2 replicas, and the other nodes have room for 1"):
        await drain_of(world).drain("10.0.0.2")
    assert world.events == []


async def test_nodes_that_leave_are_no_room_for_each_other() -> None:
    world = World()
    drain = drain_of(world)
    await drain.drain("10.0.0.3")
    with pytest.raises(InvalidInput, match="room for 0"):
        await drain.drain("10.0.0.2")


async def test_two_nodes_are_not_promised_the_same_room() -> None:
    world = World(room=3)
    world.goes = False
    world.on[OTHER] = ["x/y/z"]
    fourth = ClusterNode("dddd4444", "10.0.0.4", "fourth", False, 0)
    world.on[fourth.node_id] = [f"{POOL_APP}/{POOL_DEPLOYMENT}/r0", f"{POOL_APP}/{POOL_DEPLOYMENT}/r9"]
    nodes = world.nodes
    world.nodes = lambda: [*nodes(), fourth]  # type: ignore[method-assign]  # one more
    drain = drain_of(world)
    await drain.drain("10.0.0.2")
    with pytest.raises(InvalidInput, match="has 2 replicas, and the other nodes have room for 1"):
        await drain.drain("10.0.0.4")


async def test_a_silent_fleet_is_drained_cold_and_a_silent_cluster_is_told_of() -> None:
    world = World()
    world.silent = True
    assert (await drain_of(world).drain("10.0.0.2")).handed_over == 0
    world = World()
    world.deaf = True
    with pytest.raises(Unavailable):
        await drain_of(world).drain("10.0.0.2")
    world.deaf = False
    drain = drain_of(world)
    begun = await drain.drain("10.0.0.2")
    assert (await drain.drain(begun.node_id)).left == [], "it was not begun, so it can be again"


def test_what_is_on_a_node_is_of_every_application() -> None:
    def replica(name: str, node: str) -> dict[str, str]:
        return {"replica_id": name, "node_id": node}

    details = {"applications": {
        "pool": {"deployments": {"Pool": {"replicas": [replica("b", "n1"), replica("a", "n1"), replica("c", "n2")]}}},
        "control": {"deployments": {"Control": {"replicas": [replica("d", "n1")]}}},
    }}  # fmt: skip
    assert replicas_on(details, "n1") == ["control/Control/d", "pool/Pool/a", "pool/Pool/b"]
