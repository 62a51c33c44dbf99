"""The number of replicas: within bounds, quiet under constant load, never zero while anybody asks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatshare.placement.load import ReplicaLoad
from flatshare.placement.scaling import Bounds, Wish, decide_replicas, wish

BOUNDS = Bounds(0, 8, 4.0, 8.0, upscale_delay_s=2, downscale_delay_s=10, idle_s=30)


def load(ongoing: float = 0, loading: float = 0, rate: float = 0, idle: float = 99) -> ReplicaLoad:
    return ReplicaLoad("r", 0, ongoing, loading, rate, idle)


class Pool:
    """A pool that always has what was decided, looked at once a second."""

    def __init__(self, current: int, bounds: Bounds = BOUNDS) -> None:
        self.current = current
        self.bounds = bounds
        self.now = 0.0
        self.wishes: tuple[Wish, ...] = ()
        self.changes = 0

    def second(self, *loads: ReplicaLoad, waiting: int = 0, asked_s: float = math.inf) -> int:
        self.wishes = (*self.wishes, wish(self.now, loads, self.bounds, waiting, asked_s))
        decided, self.wishes = decide_replicas(self.now, self.current, self.wishes, self.bounds)
        if decided != self.current:
            self.changes += 1
            self.wishes = ()
        self.current = decided
        self.now += 1
        return decided


def test_it_grows_to_the_load_after_the_delay() -> None:
    pool = Pool(1)
    assert [pool.second(load(ongoing=11)) for _ in range(4)] == [1, 1, 3, 3]


def test_a_peak_of_a_moment_adds_nothing() -> None:
    pool = Pool(1)
    assert {pool.second(load(ongoing=30 if second % 3 == 0 else 2)) for second in range(30)} == {1}


def test_it_shrinks_to_the_most_that_was_wanted_lately() -> None:
    pool = Pool(6)
    pool.second(load(ongoing=12))
    seen = [pool.second(load(ongoing=2, rate=1)) for _ in range(25)]
    assert seen[:10] == [6] * 9 + [3] and seen[-1] == 1


def test_45_requests_a_second_of_a_millisecond_never_go_to_zero() -> None:
    """A gauge would show 0.045 of them: Serve's policy reads it as nothing."""
    pool = Pool(1)
    for _ in range(300):
        assert pool.second(load(ongoing=0.0, rate=45, idle=0.02)) == 1


def test_a_request_a_minute_holds_a_replica_while_idle_s_is_longer() -> None:
    pool = Pool(1, replace(BOUNDS, idle_s=61))
    assert {pool.second(load(idle=second % 60)) for second in range(300)} == {1}


def test_to_zero_when_nobody_asked_for_long_enough() -> None:
    pool = Pool(1)
    assert [pool.second(load(idle=idle)) for idle in (28, 29, 30, 31)] == [1, 1, 0, 0]


def test_from_zero_at_once_and_one_first() -> None:
    pool = Pool(0)
    assert pool.second() == 0
    assert pool.second(waiting=12, asked_s=0) == 1
    assert pool.second(asked_s=1) == 1, "it starts; nobody has reported yet"


def test_many_that_wait_for_loads_want_more_replicas() -> None:
    assert wish(0, [load(loading=20)], BOUNDS).replicas == 3


def test_other_bounds_count_at_once() -> None:
    pool = Pool(2, Bounds(5, 5))
    assert pool.second(load()) == 5


def test_the_memory_is_bounded() -> None:
    pool = Pool(1)
    for _ in range(1000):
        pool.second(load(ongoing=2, rate=9))
    assert len(pool.wishes) <= BOUNDS.downscale_delay_s + 61


LOADS = st.lists(
    st.builds(load, st.floats(0, 50), st.floats(0, 50), st.floats(0, 500), st.floats(0, 100)), max_size=5
)


@given(
    st.lists(st.tuples(LOADS, st.integers(0, 20)), max_size=40),
    st.integers(0, 8),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_it_stays_within_bounds(
    history: list[tuple[list[ReplicaLoad], int]], current: int, minimum: int, more: int
) -> None:
    pool = Pool(current, replace(BOUNDS, minimum=minimum, maximum=max(minimum + more, 1)))
    for loads, waiting in history:
        assert pool.bounds.minimum <= pool.second(*loads, waiting=waiting) <= pool.bounds.maximum


@given(LOADS, st.integers(0, 8))
def test_constant_load_settles_and_stays(loads: list[ReplicaLoad], current: int) -> None:
    pool = Pool(current)
    for _ in range(40):
        pool.second(*loads)
    pool.changes = 0
    for _ in range(100):
        pool.second(*loads)
    assert pool.changes == 0


@given(LOADS, st.floats(0, 50), st.floats(0, 50))
def test_more_load_never_wants_fewer(loads: list[ReplicaLoad], ongoing: float, loading: float) -> None:
    less = wish(0, loads, BOUNDS).replicas
    assert wish(0, [*loads, load(ongoing, loading)], BOUNDS).replicas >= less


@pytest.mark.parametrize(("given_", "clamped"), [(0, 2), (3, 3), (9, 5)])
def test_clamped(given_: int, clamped: int) -> None:
    assert Bounds(2, 5).clamped(given_) == clamped
