"""``door/listener.py`` and ``door/protocol.py``: what one connection sees, on real sockets."""

from __future__ import annotations

import asyncio
import functools
import gzip
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flatshare.api.identity import Identities, OperatorKeys, Role
from flatshare.bench.workload import encode_json
from flatshare.door.listener import Door
from flatshare.door.metrics import METRICS_PATH, MetricsServer
from flatshare.door.protocol import DoorProtocol
from flatshare.engine.jobs import Answer as Logits
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import Quotas

from ..snapshots import replica
from .conftest import Answer, Client, World, ask, request

ROWS = np.random.default_rng(0).random((1, 1, 28, 28), dtype=np.float32)
BODY = encode_json(ROWS)
MODEL = ("serve_multiplexed_model_id", "acme")


async def test_a_hot_request_is_answered_as_over_asgi_in_one_write(
    world: World, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(door, request(BODY))  # loads it
    writes: list[bytes] = []
    tasks: list[Any] = []
    client = await Client.to(door)
    await client.send(request(b"[]"))
    await client.answer()
    protocol = next(iter(door._server.server_state.connections))
    transport = protocol.transport

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(transport, name)

        def write(self, data: bytes) -> None:
            writes.append(data)
            transport.write(data)

    protocol.transport = Spy()
    loop = asyncio.get_running_loop()
    create = loop.create_task
    monkeypatch.setattr(
        loop, "create_task", lambda *given, **named: tasks.append(given) or create(*given, **named)
    )
    client.writer.write(request(BODY, [MODEL, ("x-request-id", "mine")]))
    answer = await client.answer()
    monkeypatch.undo()
    client.close()
    assert answer.status == 200
    assert answer.json == {"predicted_label": world.right("acme", ROWS)}
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["x-flatshare-tier"] == "device"
    assert len(writes) == 1, "head and body go out together: a kill between them would cut the answer"
    assert not tasks, "no task for a request that waits for its pass only"


async def test_a_cold_model_is_loaded_and_answered(world: World, door: Door) -> None:
    answer = await ask(door, request(BODY, [("serve-multiplexed-model-id", "globex@1")]))
    assert (answer.status, answer.headers["x-flatshare-tier"]) == (200, "store")
    assert answer.json == {"predicted_label": world.right("globex", ROWS)}


async def test_a_connection_carries_many_requests_one_after_the_other(world: World, door: Door) -> None:
    client = await Client.to(door)
    for _ in range(3):
        for body, status in ((BODY, 200), (b"{", 400), (BODY, 200)):
            await client.send(request(body))
            assert (await client.answer()).status == status
    client.close()


async def test_pipelined_requests_are_answered_in_their_order(world: World, door: Door) -> None:
    client = await Client.to(door)
    names = ["acme", "globex", "nobody", "acme", "globex"]
    await client.send(b"".join(request(BODY, [("serve_multiplexed_model_id", name)]) for name in names))
    for name in names:
        answer = await client.answer()
        if name == "nobody":
            assert answer.status == 404
        else:
            assert answer.headers["x-flatshare-tenant"] == name
            assert answer.json == {"predicted_label": world.right(name, ROWS)}
    client.close()


async def test_a_body_may_come_in_pieces(door: Door) -> None:
    whole = request(BODY)
    for cut in (10, len(whole) - len(BODY), len(whole) - 5):
        assert (await ask(door, whole[:cut], whole[cut:])).status == 200


async def test_who_is_refused_by_the_headers_is_told_before_the_body_is_here(door: Door) -> None:
    client = await Client.to(door)
    whole = request(BODY, [("serve_multiplexed_model_id", "not a ref")])
    await client.send(whole[: -len(BODY)])
    assert (await client.answer()).status == 400
    await client.send(BODY, request(BODY))  # the rest is read and dropped; the connection goes on
    assert (await client.answer()).status == 200
    client.close()


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ([], BODY, 400, "bad_input"),
        ([MODEL, MODEL], BODY, 400, "bad_input"),
        ([("serve_multiplexed_model_id", "nobody")], BODY, 404, "not_found"),
        ([MODEL, ("content-type", "application/x-npy")], BODY, 400, "bad_input"),
        ([MODEL], encode_json(np.zeros((9, 1, 28, 28), np.float32)), 413, "too_large"),
        ([MODEL], b" " * 150_001, 413, "too_large"),
        ([MODEL, ("content-encoding", "br")], BODY, 415, "unsupported_encoding"),
    ],
)
async def test_errors_have_our_form(
    door: Door, headers: list[tuple[str, str]], body: bytes, status: int, code: str
) -> None:
    answer = await ask(door, request(body, [*headers, ("x-request-id", "r-7")]))
    assert answer.status == status
    assert isinstance(answer.json, dict)
    assert answer.json["error"]["code"] == code
    assert answer.json["error"]["request_id"] == answer.headers["x-request-id"] == "r-7"


async def test_an_unsafe_request_id_is_replaced(door: Door) -> None:
    answer = await ask(door, request(b"{", [MODEL, ("x-request-id", "a b")]))
    assert isinstance(answer.json, dict)
    assert answer.json["error"]["request_id"] == answer.headers["x-request-id"]
    assert len(answer.headers["x-request-id"]) == 26


async def test_compressed_chunked_and_expected_bodies_take_the_usual_way(door: Door) -> None:
    packed = gzip.compress(BODY)
    assert (await ask(door, request(packed, [MODEL, ("content-encoding", "gzip")]))).status == 200
    chunked = request(b"", [MODEL, ("transfer-encoding", "chunked")], length=False)
    assert (await ask(door, chunked, b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n")).status == 200
    client = await Client.to(door)
    await client.send(request(BODY, [MODEL, ("expect", "100-continue")])[: -len(BODY)])
    assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
    await client.send(BODY)
    assert (await client.answer()).status == 200
    client.close()


@pytest.mark.parametrize(("version", "header"), [("1.0", ("x-a", "b")), ("1.1", ("connection", "close"))])
async def test_a_connection_that_is_not_kept_is_closed_after_its_answer(
    door: Door, version: str, header: tuple[str, str]
) -> None:
    client = await Client.to(door)
    await client.send(request(BODY, [MODEL, header], version=version))
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.is_closed()
    client.close()


async def test_what_is_no_http_gets_400_and_is_closed(door: Door) -> None:
    client = await Client.to(door)
    await client.send(b"\x16\x03\x01 nonsense\r\n\r\n")
    assert (await client.answer()).status == 400
    assert await client.is_closed()
    client.close()


async def test_a_body_that_drips_is_refused_in_time(world: World) -> None:
    door = Door(world.app, "127.0.0.1")
    door._server.config.http_protocol_class = functools.partial(
        DoorProtocol, hot=world.app, body_timeout_s=0.05
    )  # type: ignore[assignment]  # uvicorn only calls it
    await door.start()
    await ask(door, request(BODY))
    answer = await ask(door, request(BODY)[:-10])
    assert answer.status == 408
    await door.stop(1, notice_s=0)
    assert under_way(world) == 0


async def test_who_goes_away_within_the_body_holds_nothing(world: World, door: Door) -> None:
    world.registry.tenancy.set_quotas(TenantId("acme"), Quotas(concurrent_requests=1))
    await ask(door, request(BODY))
    client = await Client.to(door)
    await client.send(request(BODY)[:-10])
    await until(lambda: under_way(world) == 1)
    client.close()
    await until(lambda: under_way(world) == 0)
    assert (await ask(door, request(BODY))).status == 200


class Held:
    """An inference engine whose passes end when the test says."""

    max_rows = 64

    def __init__(self) -> None:
        self.jobs: list[tuple[NDArray[np.float32], Callable[[Logits], None]]] = []
        self.waiting = True

    def submit(
        self,
        lease: object,
        rows: NDArray[np.float32],
        done: Callable[[Logits], None],
        background: bool = False,
    ) -> object:
        self.jobs.append((rows, done))
        return self.jobs[-1]

    def withdraw(self, job: object) -> bool:
        return self.waiting


async def begun(world: World, door: Door) -> tuple[Held, Client]:
    """One request whose pass runs until the test ends it."""
    await ask(door, request(BODY))
    world.service.inference = held = Held()  # type: ignore[assignment]  # as much of it as is asked
    client = await Client.to(door)
    await client.send(request(BODY))
    await until(lambda: len(held.jobs) == 1)
    return held, client


async def test_who_goes_away_during_the_pass_keeps_its_lease_until_the_end(world: World, door: Door) -> None:
    held, client = await begun(world, door)
    client.close()
    await until(lambda: door.connections == 0)
    assert leases(world) == 1
    held.jobs[0][1](np.zeros((1, 10), np.float32))
    assert (leases(world), under_way(world), world.admission.ongoing) == (0, 0, 0)


@pytest.mark.parametrize("waiting", [True, False])
async def test_a_request_that_takes_too_long_is_told_so_and_a_running_pass_keeps_its_lease(
    world: World, waiting: bool
) -> None:
    world.service.deadlines._seconds = 0.05
    door = Door(world.app, "127.0.0.1")
    await door.start()
    await ask(door, request(BODY))
    world.service.inference = held = Held()  # type: ignore[assignment]  # as much of it as is asked
    held.waiting = waiting
    answer = await ask(door, request(BODY))
    assert answer.status == 504
    assert leases(world) == world.admission.ongoing == (0 if waiting else 1)
    if not waiting:
        held.jobs[0][1](np.zeros((1, 10), np.float32))
        assert leases(world) == world.admission.ongoing == 0
    assert len(world.service.deadlines) == 0
    await door.stop(1, notice_s=0)


async def test_a_full_replica_makes_a_request_wait_for_its_place(world: World, door: Door) -> None:
    await ask(door, request(BODY))
    while world.admission.enter_now():
        pass
    client = await Client.to(door)
    await client.send(request(BODY))
    await until(lambda: world.admission.queued == 1)
    world.admission.leave()
    assert (await client.answer()).status == 200
    client.close()


async def test_a_fence_that_comes_during_the_pass_stops_the_answer(world: World, door: Door) -> None:
    held, client = await begun(world, door)
    world.service.fence(TenantId("acme"), 60)
    held.jobs[0][1](np.zeros((1, 10), np.float32))
    assert (await client.answer()).status == 404
    client.close()


async def test_a_pass_that_fails_fails_its_request_only(world: World, door: Door) -> None:
    held, client = await begun(world, door)
    held.jobs[0][1](RuntimeError("of the inside"))
    answer = await client.answer()
    assert (answer.status, b"of the inside" in answer.body) == (500, False)
    assert leases(world) == 0
    client.close()


async def test_a_door_that_stops_says_so_ends_what_is_under_way_and_closes(world: World) -> None:
    door = Door(world.app, "127.0.0.1")
    await door.start()
    await ask(door, request(BODY))
    world.service.inference = held = Held()  # type: ignore[assignment]  # as much of it as is asked
    busy, idle = await Client.to(door), await Client.to(door)
    await busy.send(request(BODY))
    await until(lambda: len(held.jobs) == 1)
    health = await ask(door, request(b"", [], path="/-/healthz", method="GET"))
    assert health.status == 200
    stopping = asyncio.create_task(door.stop(5, notice_s=0.2))
    await until(lambda: not door.taking)
    await idle.send(request(b"", [], path="/-/healthz", method="GET"))
    assert (await idle.answer()).status == 503
    assert await idle.is_closed()
    held.jobs[0][1](np.zeros((1, 10), np.float32))
    answer = await busy.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    await stopping
    with pytest.raises(OSError):
        await Client.to(door)
    busy.close()
    idle.close()


async def test_what_is_written_in_two_pieces_waits_for_no_acknowledgement(door: Door) -> None:
    client = await Client.to(door)
    await client.send(request(b"", [], path="/-/healthz", method="GET"))
    await client.answer()
    protocol = next(iter(door._server.server_state.connections))
    connection = protocol.transport.get_extra_info("socket")
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    client.close()


async def test_oip_requests_are_hot_too(world: World, door: Door) -> None:
    await ask(door, request(BODY))
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28], "data": ROWS.ravel().tolist()}
    body = encode({"inputs": [tensor], "id": "7"})
    for path in ("/v2/models/acme/infer", "/v2/models/acme/versions/1/infer"):
        answer = await ask(door, request(body, [], path=path))
        assert answer.status == 200, answer.body
        assert isinstance(answer.json, dict)
        labels = next(one for one in answer.json["outputs"] if one["name"] == "predicted_label")
        assert labels["data"] == world.right("acme", ROWS)
    wrong = await ask(door, request(b"{}", [], path="/v2/models/acme/infer"))
    assert isinstance(wrong.json, dict)
    assert (wrong.status, type(wrong.json["error"])) == (400, str)


def encode(document: object) -> bytes:
    import orjson

    return orjson.dumps(document)


def under_way(world: World) -> int:
    head = world.heads.last_head(TenantId("acme"))
    assert head is not None
    return world.service.quotas._account(head).under_way


def leases(world: World) -> int:
    return sum(one.leases for one in world.cache.snapshot())


async def until(true: Callable[[], bool]) -> None:
    """Let the event loop run until something holds."""
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.001)


def test_the_ref_of_a_path_is_the_one_that_fastapi_finds() -> None:
    from flatshare.api.oip import infer_ref, is_infer_path

    assert infer_ref("/v2/models/acme:canary/infer") == ModelRef.parse("acme:canary")
    assert infer_ref("/v2/models/acme/versions/7/infer") == ModelRef.parse("acme@7")
    for path in (
        "/v2/models/acme/ready",
        "/v2/models/a/b/infer",
        "/v2/models/infer",
        "/v2/models/a/versions/infer",
    ):
        assert not is_infer_path(path)


async def test_metrics_are_for_operators_and_for_nobody_who_comes_by_an_edge(world: World) -> None:
    async def told() -> ReplicaSnapshot:
        return replica("r1")

    identities = Identities(world.heads, OperatorKeys.of(world.operators), clock=world.wall_clock)
    secured = Door(world.app, "127.0.0.1", metrics=MetricsServer(identities, told))
    await secured.start()

    async def asked(*headers: tuple[str, str], method: str = "GET") -> Answer:
        return await ask(secured, request(b"", headers, path=METRICS_PATH, method=method, length=False))

    key = ("x-api-key", world.operators[Role.VIEWER])
    found = await asked(key)
    assert found.status == 200 and b'flatshare_leases_total{replica="r1",tier="device"} 6.0' in found.body
    assert (await asked()).status == 401
    assert (await asked(key, ("x-forwarded-for", "192.0.2.1"))).status == 404
    assert (await asked(key, method="POST")).status == 400
    await secured.stop(1, notice_s=0)
