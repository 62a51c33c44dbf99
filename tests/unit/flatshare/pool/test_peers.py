"""Which nodes are asked for a tenant's weights: others than this one, in the ring's order, one door each."""

from __future__ import annotations

import asyncio
import threading

import pytest

from flatshare.placement.ring import ring_of
from flatshare.pool import peers
from flatshare.pool.details import DoorAddress
from flatshare.pool.peers import PeerDoors
from flatshare.weights.peers import Peer, PeerTiers


def door(place: int, host: str) -> DoorAddress:
    return DoorAddress(f"r{place}", host, 9000 + place, place)


DOORS = [door(0, "a"), door(1, "a"), door(2, "b"), door(3, "b"), door(4, "c"), door(5, "d")]


async def test_other_nodes_are_asked_in_the_rings_order_one_door_each() -> None:
    found = PeerDoors("a", lambda: DOORS, lambda candidate: candidate)
    assert found.key() is None and found.of("acme") == ()
    await found.look()
    assert len(found.key() or b"") == 32
    for number in range(50):
        tenant = f"t{number}"
        order = [DOORS[place] for place in ring_of(range(6)).homes(tenant)]
        hosts = list(dict.fromkeys(one.host for one in order if one.host != "a"))[:2]
        first = {host: next(one for one in order if one.host == host) for host in hosts}
        assert found.of(tenant) == tuple(Peer(first[host].host, first[host].port) for host in hosts)


async def test_it_looks_again_when_somebody_asks_and_the_look_is_old() -> None:
    now, looks = 0.0, 0

    def ask() -> list[DoorAddress]:
        nonlocal looks
        looks += 1
        return DOORS if looks > 1 else DOORS[:2]

    found = PeerDoors("a", ask, lambda candidate: candidate, clock=lambda: now)
    await found.look()
    assert (found.of("acme"), looks) == ((), 1)
    now = peers.FEW_FRESH_S + 1
    known = await asyncio.to_thread(found.of, "acme")
    assert (len(known), looks) == (2, 2), "while no other node is known, a load waits for the look"
    now += peers.FEW_FRESH_S + 1
    assert await asyncio.to_thread(found.of, "acme") == known
    assert looks == 2
    now += peers.FRESH_S
    assert await asyncio.to_thread(found.of, "acme") == known, "and else nobody waits"
    while looks == 2:
        await asyncio.sleep(0)


async def test_a_cluster_that_hangs_costs_a_load_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LOOK_S", 0.05)
    go = threading.Event()
    found = PeerDoors("a", lambda: [DOORS[0]] * go.wait(10), lambda candidate: candidate)
    assert await asyncio.to_thread(found.of, "acme") == ()
    go.set()
    await found.look()


async def test_a_key_that_could_not_be_read_is_read_by_the_next_load() -> None:
    now, answers = 0.0, [RuntimeError("GCS"), b"key"]

    def key_of(candidate: bytes) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = PeerDoors("a", lambda: DOORS, key_of, clock=lambda: now)
    asks = PeerTiers(found.key, found.of)
    await found.look()
    assert await asyncio.to_thread(asks.to_ask, "acme") == [], "a moment ago"
    now = peers.FEW_FRESH_S + 1
    assert len(await asyncio.to_thread(asks.to_ask, "acme")) == 2


async def test_a_look_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    answers = [DOORS, RuntimeError("GCS")]

    def ask() -> list[DoorAddress]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = PeerDoors("a", ask, lambda candidate: candidate)
    await found.look()
    before = found.of("acme")
    await found.look()
    assert found.of("acme") == before and len(before) == 2
    assert "RuntimeError" in caplog.text
