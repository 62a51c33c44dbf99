"""``door/peers.py`` and ``weights/peers.py``: tensors of another node's tier, over a real door."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from flatshare.door import peers as server
from flatshare.door.listener import Door
from flatshare.door.peers import TierServer
from flatshare.models.architecture import architecture
from flatshare.threads import ThreadWork
from flatshare.weights import peers as client
from flatshare.weights.fetch import Fetched, TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare.weights.peers import PEER_PATH, SIGNATURE_HEADER, Peer, PeerAsked, PeerTiers, peer_request
from flatshare.weights.tiers import Tier
from flatshare_registry import Registry, TenantId
from flatshare_registry.errors import NotFound
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.memory import MemoryStore

from .conftest import Answer, Client, World, ask, request

NETWORK = architecture("mnist-cnn")
KEY = b"k" * 32


@dataclass
class Nodes:
    """Two nodes with a tier each; the other one has a door."""

    door: Door
    mine: HostTier
    other: HostTier
    store: MemoryStore
    record: VersionRecord
    weights: bytes
    work: ThreadWork

    @property
    def right(self) -> dict[str, bytes]:
        return {one.sha256: self.weights[one.start : one.end] for one in self.record.tensors}

    def asking(self, *more: Peer, key: bytes | None = KEY) -> tuple[TensorSource, PeerTiers]:
        """A source of this node that asks ``more``, then the other node."""
        found = (*more, Peer(self.door.host, self.door.port))
        peers = PeerTiers(lambda: key, lambda tenant: found)
        return TensorSource(self.store, self.mine, peers=peers), peers

    async def read(self, source: TensorSource) -> Fetched:
        names = {one.name for one in self.record.tensors}
        found = await asyncio.to_thread(source.read, self.record, names, 10)
        assert {digest: bytes(data) for digest, data in found.data.items()} == self.right
        assert set(self.right) <= set(self.mine.digests()), "it is in this node's tier now"
        return found

    def fill(self, left_out: int = 0) -> None:
        """Put the version into the other node's tier, but for so many of its tensors."""
        names = [one.name for one in self.record.tensors]
        TensorSource(self.store, self.other).read(self.record, names[: len(names) - left_out], 10)


@pytest.fixture
async def nodes(world: World, tmp_path: Path) -> AsyncIterator[Nodes]:
    torch.manual_seed(3)
    store = MemoryStore()
    weights = save(dict(NETWORK.build().state_dict()))
    registry = Registry(store)
    registry.create_tenant(TenantId("acme"))
    record = registry.register(TenantId("acme"), weights, NETWORK.name, NETWORK.tensors).version
    mine, other = (HostTier(tmp_path / name, 64 * 1024**2) for name in ("mine", "other"))
    work = ThreadWork()
    door = Door(world.app, "127.0.0.1", tier=TierServer(other, work, lambda: KEY))
    await door.start()
    yield Nodes(door, mine, other, store, record, weights, work)
    await door.stop(1, notice_s=0)


async def test_what_another_node_has_is_not_asked_of_the_store(nodes: Nodes) -> None:
    nodes.fill()
    source, peers = nodes.asking()
    assert (await nodes.read(source)).tier is Tier.PEER
    assert source.fetched_bytes == 0
    assert peers.received_bytes == sum(one.size_bytes for one in nodes.record.tensors)
    assert (await nodes.read(source)).tier is Tier.HOST, "and the next time it is here"


async def test_what_it_has_not_comes_from_the_store(nodes: Nodes) -> None:
    nodes.fill(left_out=1)
    source, peers = nodes.asking()
    assert (await nodes.read(source)).tier is Tier.STORE
    sizes = [one.size_bytes for one in nodes.record.tensors]
    assert peers.received_bytes == sum(sizes[:-1]), "and only that"
    assert source.fetched_bytes == sizes[-1]


async def test_a_peer_with_nothing_costs_one_question_and_is_asked_again(nodes: Nodes) -> None:
    source, peers = nodes.asking()
    assert (await nodes.read(source)).tier is Tier.STORE
    assert len(peers.to_ask("acme")) == 1


async def test_damaged_bytes_of_a_peer_are_found_and_it_is_avoided(nodes: Nodes) -> None:
    nodes.fill()
    largest = max(nodes.record.tensors, key=lambda one: one.size_bytes)
    path = nodes.other.path(largest.sha256)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"wrong")
    source, peers = nodes.asking()
    assert (await nodes.read(source)).tier is Tier.STORE
    assert peers.to_ask("acme") == []


async def test_a_dead_and_a_silent_peer_cost_a_second_once(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PIECE_S", 0.1)
    nodes.fill()
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as dead:
        there = [Peer(*one.getsockname()) for one in (silent, dead)]
        dead.close()
        source, peers = nodes.asking(*there)
        began = time.monotonic()
        assert (await nodes.read(source)).tier is Tier.STORE, "two were asked, and no third"
        assert time.monotonic() - began < 3
        assert peers.to_ask("acme") == [Peer(nodes.door.host, nodes.door.port)]


async def test_an_answer_that_breaks_off_is_ended_by_the_store(nodes: Nodes) -> None:
    nodes.fill()

    def half(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            count = (1 << len(nodes.record.tensors)) - 1
            head = f"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n{client.HAVE_HEADER}: {count:x}\r\n\r\n"
            first = nodes.record.tensors[0]
            connection.sendall(head.encode() + nodes.weights[first.start : first.end] + b"half a tensor")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=half, args=(listener,))
        thread.start()
        peers = PeerTiers(lambda: KEY, lambda tenant: [Peer(*listener.getsockname())])
        source = TensorSource(nodes.store, nodes.mine, peers=peers)
        assert (await nodes.read(source)).tier is Tier.STORE
        thread.join()
    first = nodes.record.tensors[0].size_bytes
    assert source.fetched_bytes == sum(one.size_bytes for one in nodes.record.tensors) - first


async def test_nobody_without_the_key_gets_anything(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.fill()
    asked = PeerAsked("acme", tuple((one.sha256, one.size_bytes) for one in nodes.record.tensors))
    now = time.time()

    async def post(body: bytes, *signatures: str) -> Answer:
        headers = [(SIGNATURE_HEADER, one) for one in signatures]
        return await ask(nodes.door, request(body, headers, path=PEER_PATH))

    body, good = peer_request(KEY, asked, now)
    assert (await post(body, good)).status == 200
    second, _, mac = good.partition(".")
    wrong = [
        (), ("",), ("1",), (good, good), (f"{int(second) + 1}.{mac}",), (f"{second}.{'0' * 64}",), (f"{second}.\xe9",),
        (peer_request(b"x" * 32, asked, now)[1],), (peer_request(KEY, asked, now - 100)[1],),
        (peer_request(KEY, asked, now + 100)[1],),
    ]  # fmt: skip
    for signatures in wrong:
        assert (await post(body, *signatures)).status == 401, signatures
    assert (await post(body.replace(b"acme", b"acm2"), good)).status == 401
    assert (await ask(nodes.door, request(b"", path=PEER_PATH, method="GET"))).status == 405
    monkeypatch.setattr(server, "MOST_REQUEST_BYTES", 10)
    assert (await post(body, good)).status == 413
    monkeypatch.setattr(server, "MOST_AT_ONCE", 0)
    assert (await post(body, good)).status == 503


@pytest.mark.parametrize("key", [None, b"another"])
async def test_who_has_another_key_or_none_asks_the_store(nodes: Nodes, key: bytes | None) -> None:
    nodes.fill()
    source, peers = nodes.asking(key=key)
    assert (await nodes.read(source)).tier is Tier.STORE
    assert (peers.received_bytes, peers.to_ask("acme")) == (0, [])


async def test_a_busy_peer_is_asked_again(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.fill()
    monkeypatch.setattr(server, "MOST_AT_ONCE", 0)
    source, peers = nodes.asking()
    assert (await nodes.read(source)).tier is Tier.STORE
    assert len(peers.to_ask("acme")) == 1


async def test_who_comes_by_an_edge_finds_no_such_path(nodes: Nodes) -> None:
    nodes.fill()
    first = nodes.record.tensors[0]
    asked = PeerAsked("acme", ((first.sha256, first.size_bytes),))
    body, signature = peer_request(KEY, asked, time.time())
    shown = [(SIGNATURE_HEADER, signature)]
    assert (await ask(nodes.door, request(body, shown, path=PEER_PATH))).status == 200
    for path in (PEER_PATH, "/%2d/peer/tensors"):
        answer = await ask(nodes.door, request(body, [*shown, ("x-forwarded-for", "192.0.2.1")], path=path))
        assert answer.status == 404 and b"no_such_route" in answer.body


async def test_a_peer_that_drips_is_given_up_in_time(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            head = f"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n{client.HAVE_HEADER}: 1\r\n\r\n"
            connection.sendall(head.encode())
            while not stop.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        peers = PeerTiers(lambda: KEY, lambda tenant: [Peer(*listener.getsockname())])
        source = TensorSource(nodes.store, nodes.mine, peers=peers)
        names = {one.name for one in nodes.record.tensors}
        began = time.monotonic()
        found = await asyncio.to_thread(source.read, nodes.record, names, 2)
        assert found.tier is Tier.STORE and time.monotonic() - began < 2, "half of its time"
        stop.set()
        thread.join()


async def test_a_door_without_a_tier_knows_no_such_path(world: World) -> None:
    door = Door(world.app, "127.0.0.1")
    await door.start()
    asked = peer_request(KEY, PeerAsked("acme", ()), time.time())
    answer = await ask(door, request(asked[0], [(SIGNATURE_HEADER, asked[1])], path=PEER_PATH))
    assert answer.status == 404 and b"no_such_route" in answer.body
    await door.stop(1, notice_s=0)


async def test_an_erasure_waits_for_an_answer_under_way_and_ends_it(nodes: Nodes) -> None:
    nodes.fill()
    asked = PeerAsked("acme", tuple((one.sha256, one.size_bytes) for one in nodes.record.tensors))
    body, signature = peer_request(KEY, asked, time.time())
    slow = await Client.to(nodes.door)
    slow.writer.write(request(body, [(SIGNATURE_HEADER, signature)], path=PEER_PATH))
    await slow.reader.readuntil(b"\r\n\r\n")  # and no more: the answer stands at its flow control
    assert not await nodes.work.ended("acme", 0.05), "its bytes are mapped"
    begun = nodes.other.scrub(list(nodes.right))
    assert begun.kept
    nodes.work.stop("acme")
    rest = await slow.reader.read()
    while piece := await slow.reader.read(2**20):
        rest += piece
    assert len(rest) < sum(one.size_bytes for one in nodes.record.tensors), "it was cut"
    assert await nodes.work.ended("acme", 5)
    assert set(nodes.other.scrub(list(nodes.right)).removed) == set(begun.kept)
    assert nodes.other.digests() == []
    assert (
        await ask(nodes.door, request(body, [(SIGNATURE_HEADER, signature)], path=PEER_PATH))
    ).status == 404
    slow.close()


async def test_nothing_of_a_tenant_that_was_erased_here_is_published(nodes: Nodes) -> None:
    nodes.fill()
    source, _ = nodes.asking()
    source.work.stop("acme")
    with pytest.raises(NotFound):
        await asyncio.to_thread(source.read, nodes.record, {one.name for one in nodes.record.tensors}, 10)
    assert nodes.mine.digests() == []


async def test_a_request_names_its_tensors_with_their_lengths(nodes: Nodes) -> None:
    nodes.fill()
    first = nodes.record.tensors[0]
    asked = PeerAsked("acme", ((first.sha256, first.size_bytes + 1), ("../../usage", 32)))
    body, signature = peer_request(KEY, asked, time.time())
    assert json.loads(body)["tensors"][0] == [first.sha256, first.size_bytes + 1]
    assert (
        await ask(nodes.door, request(body, [(SIGNATURE_HEADER, signature)], path=PEER_PATH))
    ).status == 404
