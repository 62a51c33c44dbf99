"""The supervisor's decisions, with a process that has what it was told, as HAProxy does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from flatshare.edge.options import EdgeOptions
from flatshare.edge.servers import RunningServer, Server
from flatshare.edge.supervisor import PATIENCE, EdgeSupervisor, EdgeTargets
from flatshare.errors import LocalError
from flatshare_registry.errors import Unavailable

ONE, TWO = Server(0, "127.0.0.1", 30001), Server(1, "127.0.0.1", 30002)


class Remembering:
    """An HAProxy without a network: two backends, a map, and files for its next start."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.events: list[str] = []
        self.files = ("", {})  # type: tuple[str, Mapping[str, str]]
        self.have: dict[str, list[RunningServer]] = {"pool": [], "control": []}
        self.map: dict[str, str] = {}
        self.deaf = False

    def write(self, configuration: str, copies: Mapping[str, str] | None = None) -> None:
        self.files = (configuration, copies or {})

    def start(self, configuration: str, copies: Mapping[str, str] | None = None) -> None:
        self.write(configuration, copies)
        self.pid = 1
        self._read()
        self.events.append("start")

    def reload(self) -> None:
        self._read()
        self.events.append("reload")

    def _read(self) -> None:
        for backend in self.have:
            lines = self.files[0].split(f"\nbackend {backend}\n")[1].split("\nbackend ")[0].splitlines()
            named = [line.split() for line in lines if line.startswith("    server p")]
            self.have[backend] = [
                RunningServer(
                    Server(int(words[1][1:]), words[2].split(":")[0], int(words[2].split(":")[1])), False
                )
                for words in named
            ]
        self.map = dict(self.files[1])

    def stop(self) -> None:
        self.pid = None

    def servers(self, backend: str) -> list[RunningServer]:
        return list(self.have[backend])

    def copies(self) -> dict[str, str]:
        return self.map

    def replace_copies(self, wanted: Mapping[str, str]) -> None:
        if self.deaf:
            raise LocalError("no")
        self.map = dict(wanted)
        self.events.append(f"copies {len(wanted)}")

    def command(self, text: str) -> str:
        self.events.append(text.partition(" check")[0])
        verb, _, name, *rest = text.split()
        backend, _, number = name.partition("/p")
        if self.deaf:
            return "no"
        if verb == "add":
            host, _, port = rest[0].partition(":")
            self.have[backend].append(RunningServer(Server(int(number), host, int(port)), False))
        elif verb == "del":
            self.have[backend] = [one for one in self.have[backend] if one.server.place != int(number)]
        return ""


class World:
    def __init__(self) -> None:
        self.process = Remembering()
        self.targets = EdgeTargets((ONE,), ())
        self.down = False
        options = EdgeOptions("127.0.0.1", 8000, Path("/x"), 8500, 1024, 512, 30)
        self.supervisor = EdgeSupervisor(self.process, options, self.read)

    def read(self) -> EdgeTargets:
        if self.down:
            raise Unavailable("controller")
        return self.targets


@pytest.fixture
def world() -> World:
    world = World()
    world.supervisor.start()
    return world


def test_it_tells_only_what_changed_and_reloads_nothing(world: World) -> None:
    assert not world.supervisor.look()
    world.targets = EdgeTargets((ONE, TWO), ())
    assert world.supervisor.look()
    assert not world.supervisor.look()
    assert world.process.events == [
        "start", "add server pool/p1 127.0.0.1:30002 id 2", "enable server pool/p1", "enable health pool/p1",
    ]  # fmt: skip
    assert world.supervisor.reloads == 0


def test_the_files_say_the_same_as_what_runs(world: World) -> None:
    world.targets = EdgeTargets((TWO,), (ONE,), {"acme": (0, 1)})
    world.supervisor.look()
    before = (dict(world.process.have), dict(world.process.map))
    world.process.reload()
    assert (world.process.have, world.process.map) == before
    assert len(world.process.map) == 61


def test_it_goes_on_with_what_it_has_while_serve_does_not_answer(world: World) -> None:
    world.down = True
    assert not world.supervisor.look()
    world.process.pid = None
    assert world.supervisor.look()
    assert world.process.events == ["start", "start"]
    assert world.process.have["pool"] == [RunningServer(ONE, False)]


def test_what_haproxy_does_not_take_is_said_again_and_then_it_is_reloaded(world: World) -> None:
    world.targets = EdgeTargets((ONE, TWO), ())
    world.process.deaf = True
    for _ in range(PATIENCE):
        assert world.supervisor.look()
    assert "reload" not in world.process.events
    assert world.supervisor.look()
    assert world.process.events[-1] == "reload" and world.supervisor.reloads == 1
    assert not world.supervisor.look()


def test_a_map_that_is_refused_is_tried_again(world: World) -> None:
    world.targets = EdgeTargets((ONE,), (), {"acme": (0, 1)})
    world.process.deaf = True
    assert not world.supervisor.look()
    world.process.deaf = False
    assert world.supervisor.look()
    assert not world.supervisor.look()


def test_it_cannot_start_without_knowing_targets() -> None:
    world = World()
    world.down = True
    with pytest.raises(Unavailable):
        world.supervisor.start()
