"""The supervisor's decisions, with a process that only remembers what it was told."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatshare.edge.configuration import EdgeOptions
from flatshare.edge.supervisor import EdgeSupervisor, EdgeTargets
from flatshare.errors import LocalError
from flatshare.pool.details import Target
from flatshare_registry.errors import Unavailable

ONE, TWO = Target("r1", "127.0.0.1", 30001), Target("r2", "127.0.0.1", 30002)


class Remembering:
    def __init__(self) -> None:
        self.pid: int | None = None
        self.events: list[str] = []
        self.refuse = False

    def start(self, configuration: str) -> None:
        self.pid = 1
        self.events.append(f"start {configuration.count(' id ')}")

    def reload(self, configuration: str) -> None:
        if self.refuse:
            raise LocalError("refused")
        self.events.append(f"reload {configuration.count(' id ')}")

    def stop(self) -> None:
        self.pid = None


class World:
    def __init__(self) -> None:
        self.process = Remembering()
        self.pool: tuple[Target, ...] = (ONE,)
        self.down = False
        options = EdgeOptions("127.0.0.1", 8000, Path("/x"), 8500, 1024, 512, 30)
        self.supervisor = EdgeSupervisor(self.process, options, self.read)  # type: ignore[arg-type]  # a stand-in

    def read(self) -> EdgeTargets:
        if self.down:
            raise Unavailable("controller")
        return EdgeTargets(self.pool, ())


@pytest.fixture
def world() -> World:
    world = World()
    world.supervisor.start()
    return world


def test_it_reloads_only_when_targets_change(world: World) -> None:
    assert not world.supervisor.look()
    world.pool = (ONE, TWO)
    assert world.supervisor.look()
    assert not world.supervisor.look()
    assert world.process.events == ["start 3", "reload 4"]  # two fallbacks beside the replicas


def test_it_goes_on_with_what_it_has_while_serve_does_not_answer(world: World) -> None:
    world.down = True
    assert not world.supervisor.look()
    world.process.pid = None
    assert world.supervisor.look()
    assert world.process.events == ["start 3", "start 3"]


def test_a_refused_configuration_is_tried_again(world: World) -> None:
    world.pool, world.process.refuse = (ONE, TWO), True
    assert not world.supervisor.look()
    world.process.refuse = False
    assert world.supervisor.look()
    assert world.process.events[-1] == "reload 4"


def test_it_cannot_start_without_knowing_targets() -> None:
    world = World()
    world.down = True
    with pytest.raises(Unavailable):
        world.supervisor.start()
