"""Servers and copies changed in a running HAProxy: the ring is ours, streams survive, files and process agree."""

from __future__ import annotations

import http.client
import http.server
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flatshare.edge.options import EdgeOptions
from flatshare.edge.process import HaproxyProcess
from flatshare.edge.servers import Server
from flatshare.edge.supervisor import EdgeSupervisor, EdgeTargets
from flatshare.placement.ring import Ring
from flatshare_registry.testing.ports import free_ports

MODEL = "serve_multiplexed_model_id"


class Naming(http.server.ThreadingHTTPServer):
    """Answers with its own number; ``/predict/stream`` answers in pieces, until it is told to end."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, number: int) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.number = number
        self.go_on = threading.Semaphore(0)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """HAProxy closes connections of a server whose address changed: no news."""


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 4096  # head and body in one piece: two would wait for each other's acknowledgement
    server: Naming

    def do_GET(self) -> None:
        body = str(self.server.number).encode()
        self.send_response(200)
        if self.path == "/predict/stream":
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for piece in (b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n"):
                self.wfile.write(piece)
                self.wfile.flush()
                self.server.go_on.acquire(timeout=20)
            return
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class World:
    def __init__(self, folder: Path) -> None:
        self.backends = [Naming(number) for number in range(6)]
        self.process = HaproxyProcess(folder / "edge")
        port, fallback = free_ports(2)
        self.options = EdgeOptions("127.0.0.1", port, self.process.admin_socket, fallback, 10**6, 65536, 10)
        self.targets = EdgeTargets((), ())
        self.supervisor = EdgeSupervisor(self.process, self.options, lambda: self.targets)
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def at(self, place: int, backend: int | None = None) -> Server:
        number = place if backend is None else backend
        return Server(place, "127.0.0.1", self.backends[number].server_port)

    def go_to(self, *servers: Server, **copies: tuple[int, ...]) -> None:
        self.targets = EdgeTargets(servers, (), copies)
        self.supervisor.look()
        self.wait(lambda: self.up() == {one.name for one in servers})

    def up(self) -> set[str]:
        states = self.process.server_states()
        return {
            name.removeprefix("pool/")
            for name, state in states.items()
            if name.startswith("pool/p") and state in ("UP", "no check")
        }

    def wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 15
        while not done():
            assert time.monotonic() < deadline, self.process.server_states()
            time.sleep(0.02)  # HAProxy's checks can only be polled

    def ask(self, model: str) -> int:
        self.connection.request("GET", "/", headers={MODEL: model})
        reply = self.connection.getresponse()
        body = reply.read()
        assert reply.status == 200, body
        return int(body)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.targets = EdgeTargets((world.at(0), world.at(1)), ())
    world.supervisor.start()
    world.wait(lambda: world.up() == {"p0", "p1"})
    yield world
    world.connection.close()
    world.process.stop()
    for one in world.backends:
        one.shutdown()
        one.server_close()


def test_the_ring_is_haproxys_through_comings_and_goings(world: World) -> None:
    for places in ([0, 1], [0, 1, 2, 3], [0, 2, 3], [3], [0, 1, 2, 3, 4, 5]):
        world.go_to(*(world.at(place) for place in places))
        ring = Ring(places)
        for number in range(500):
            model = f"tenant-{number}" if number % 3 else f"t{number}:canary"
            assert world.ask(model) == ring.home(model), (places, model)
    assert world.supervisor.reloads == 0


def test_a_replacement_takes_over_its_places_models(world: World) -> None:
    world.go_to(world.at(0), world.at(1), world.at(2))
    before = {f"m{n}": world.ask(f"m{n}") for n in range(100)}
    world.go_to(world.at(0), world.at(1, backend=4), world.at(2))
    after = {model: world.ask(model) for model in before}
    assert after == {model: 4 if home == 1 else home for model, home in before.items()}


def test_copies_share_a_models_requests_and_nobody_elses(world: World) -> None:
    world.go_to(*(world.at(place) for place in range(4)), hot=(0, 2))
    counts = Counter(world.ask("hot") for _ in range(400))
    assert set(counts) == {0, 2} and min(counts.values()) > 120
    ring = Ring(range(4))
    assert all(world.ask(f"m{n}") == ring.home(f"m{n}") for n in range(100))
    world.go_to(*(world.at(place) for place in range(4)))
    assert {world.ask("hot") for _ in range(20)} == {ring.home("hot")}


def test_a_model_that_was_moved_is_asked_for_at_its_new_home(world: World) -> None:
    ring = Ring(range(4))
    elsewhere = (ring.homes("acme")[0] + 1) % 4
    world.go_to(*(world.at(place) for place in range(4)), acme=(elsewhere,), hot=(0, 2))
    assert {world.ask("acme") for _ in range(20)} == {elsewhere}
    assert {world.ask("hot") for _ in range(100)} == {0, 2}
    world.go_to(*(world.at(place) for place in range(4) if place != elsewhere), acme=(elsewhere,))
    left = Ring(place for place in range(4) if place != elsewhere)
    assert {world.ask("acme") for _ in range(20)} == {left.home("acme")}, "while that one is away"


def test_a_copy_whose_server_is_away_is_served_by_the_others(world: World) -> None:
    world.go_to(*(world.at(place) for place in range(4)), hot=(0, 2))
    world.go_to(*(world.at(place) for place in (0, 1, 3)), hot=(0, 2))
    assert {world.ask("hot") for _ in range(100)} <= {0, 1, 3}


def test_a_stream_goes_on_while_its_server_is_taken_out(world: World) -> None:
    ring = Ring([0, 1])
    model = next(f"m{n}" for n in range(100) if ring.home(f"m{n}") == 1)
    stream = http.client.HTTPConnection("127.0.0.1", world.options.port, timeout=20)
    stream.request("GET", "/predict/stream", headers={MODEL: model})
    reply = stream.getresponse()
    assert reply.read(1) == b"a"
    world.go_to(world.at(0))
    assert world.ask(model) == 0
    world.backends[1].go_on.release(3)
    assert reply.read() == b"b"
    stream.close()


def test_after_any_history_files_and_process_agree(world: World) -> None:
    """Changes at random, HAProxy killed between two of them, also in the middle of being told."""
    dice = random.Random(5)
    for step in range(40):
        places = sorted(dice.sample(range(6), dice.randint(1, 6)))
        copies = {f"m{dice.randint(0, 3)}": tuple(places[:3])} if dice.random() < 0.5 else {}
        world.targets = EdgeTargets(
            tuple(world.at(place, dice.randrange(6)) for place in places), (world.at(0),), copies
        )
        if step % 7 == 3:
            pid = world.process.workers()[0]
            killer = threading.Timer(dice.random() * 0.003, kill, [pid])
            killer.start()
            world.supervisor.look()
            killer.join()
            world.wait(lambda: world.process.pid is None)
        world.supervisor.look()
        check(world)
    assert world.supervisor.reloads == 0


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def check(world: World) -> None:
    """What runs is what is wanted, and a HAProxy that starts from the files now would be the same."""
    running = {one.server for one in world.process.servers("pool") if not one.resting}
    assert running == set(world.targets.pool)
    text = (world.process.admin_socket.parent / "haproxy.cfg").read_text()
    assert text == world.supervisor._configuration()
    in_file = dict(line.split(" ", 1) for line in world.process.copies_map.read_text().splitlines())
    assert in_file == world.process.copies()
