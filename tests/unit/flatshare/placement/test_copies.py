"""Copies of hot models: as many as the load needs, at the first homes; none come and go under constant load."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flatshare.placement.copies import COOL_S, SHRINK_AT, Spread, decide_copies
from flatshare.placement.load import ReplicaLoad
from flatshare.placement.ring import Ring

TARGET = 4.0


def loads(replicas: int, **models: float) -> list[ReplicaLoad]:
    """A fleet in which each model's requests are spread over all replicas."""
    shares = {name: ongoing / replicas for name, ongoing in models.items()}
    return [
        ReplicaLoad(f"r{place}", place, sum(shares.values()), 0, 9, 0, shares) for place in range(replicas)
    ]


def test_a_model_that_one_replica_can_serve_has_no_copies() -> None:
    assert decide_copies(0, loads(4, acme=TARGET, other=1), {}, TARGET) == {}


def test_one_that_is_too_much_gets_its_first_homes_at_once() -> None:
    found = decide_copies(0, loads(4, acme=2.5 * TARGET), {}, TARGET)
    assert found == {"acme": Spread(tuple(Ring(range(4)).homes("acme", 3)))}


def test_all_the_load_uses_all_replicas_and_no_more() -> None:
    found = decide_copies(0, loads(4, acme=100 * TARGET), {}, TARGET)
    assert sorted(found["acme"].places) == [0, 1, 2, 3]
    assert decide_copies(0, loads(1, acme=100 * TARGET), {}, TARGET) == {}


def test_copies_go_when_demand_was_low_for_a_while() -> None:
    hot = decide_copies(0, loads(4, acme=3 * TARGET), {}, TARGET)
    cooling = decide_copies(1, loads(4, acme=0.5), hot, TARGET)
    assert cooling["acme"].places == hot["acme"].places and cooling["acme"].cool_since == 1
    still = decide_copies(COOL_S, loads(4, acme=0.5), cooling, TARGET)
    assert still["acme"].places == hot["acme"].places
    assert decide_copies(1 + COOL_S, loads(4, acme=0.5), still, TARGET) == {}


def test_a_wave_in_between_begins_the_wait_anew() -> None:
    hot = decide_copies(0, loads(4, acme=3 * TARGET), {}, TARGET)
    cooling = decide_copies(1, loads(4), hot, TARGET)
    again = decide_copies(5, loads(4, acme=3 * TARGET), cooling, TARGET)
    assert again["acme"].cool_since is None
    assert "acme" in decide_copies(1 + COOL_S, loads(4), again, TARGET)


def test_a_copy_too_many_goes_and_the_others_stay() -> None:
    spreads = {"acme": Spread(tuple(Ring(range(4)).homes("acme", 4)), cool_since=0)}
    demand = SHRINK_AT * TARGET * 2 - 0.1
    found = decide_copies(COOL_S, loads(4, acme=demand), spreads, TARGET)
    assert found["acme"].places == spreads["acme"].places[:2]


DEMANDS = st.dictionaries(st.sampled_from(["a", "b:canary", "c@7"]), st.floats(0, 60), max_size=3)


@given(DEMANDS, st.integers(1, 6), st.lists(DEMANDS, max_size=4))
def test_constant_load_changes_nothing_once_it_was_seen(
    demand: dict[str, float], replicas: int, past: list[dict[str, float]]
) -> None:
    spreads: dict[str, Spread] = {}
    now = 0.0
    for before in past:
        spreads = decide_copies(now, loads(replicas, **before), spreads, TARGET)
        now += 1
    for _ in range(int(COOL_S) + 2):
        spreads = decide_copies(now, loads(replicas, **demand), spreads, TARGET)
        now += 1
    settled = {name: spread.places for name, spread in spreads.items()}
    for _ in range(30):
        spreads = decide_copies(now, loads(replicas, **demand), spreads, TARGET)
        now += 1
        assert {name: spread.places for name, spread in spreads.items()} == settled
    assert all(1 < len(places) <= replicas for places in settled.values())


@given(st.floats(0, 60), st.floats(0, 60), st.integers(1, 6))
def test_more_demand_never_means_fewer_copies(one: float, more: float, replicas: int) -> None:
    def count(demand: float) -> int:
        found = decide_copies(0, loads(replicas, acme=demand), {}, TARGET)
        return len(found["acme"].places) if found else 1

    assert count(one) <= count(one + more)


def test_one_that_lost_a_home_gets_the_next() -> None:
    spreads = {"acme": Spread(tuple(Ring(range(4)).homes("acme", 2)))}
    left = [load for load in loads(4, acme=2 * TARGET) if load.place != spreads["acme"].places[0]]
    found = decide_copies(0, left, spreads, TARGET)
    assert found["acme"].places == tuple(Ring([load.place for load in left]).homes("acme", 2))
