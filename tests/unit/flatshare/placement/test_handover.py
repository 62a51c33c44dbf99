"""What replicas load before one comes or goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flatshare.placement.handover import after_loss, to_load
from flatshare.placement.load import Held
from flatshare.placement.ring import Ring

MODELS = [f"m{number}" for number in range(40)]


def test_who_is_beyond_the_end_takes_the_free_number() -> None:
    assert after_loss({0: "a", 1: "b", 2: "c"}, "b") == {0: "a", 1: "c"}
    assert after_loss({0: "a", 1: "b", 2: "c"}, "c") == {0: "a", 1: "b"}
    assert after_loss({0: "a"}, "a") == {}


def held(replicas: int, slots: int = 20) -> list[Held]:
    ring = Ring(range(replicas))
    return [
        Held(f"r{place}", place, slots, [model for model in MODELS if ring.home(model) == place])
        for place in range(replicas)
    ]


def test_a_newcomer_loads_what_becomes_its_own() -> None:
    found = to_load([*held(3), Held("new", 3, 20, [])], {0: "r0", 1: "r1", 2: "r2", 3: "new"})
    assert set(found) == {"new"}
    ring = Ring(range(4))
    assert set(found["new"]) == {model for model in MODELS if ring.home(model) == 3}


def test_most_recent_first_and_no_more_than_its_slots() -> None:
    found = to_load([*held(3), Held("new", 3, 4, [])], {0: "r0", 1: "r1", 2: "r2", 3: "new"})
    all_of_it = to_load([*held(3), Held("new", 3, 20, [])], {0: "r0", 1: "r1", 2: "r2", 3: "new"})
    assert found["new"] == all_of_it["new"][:4]


@given(st.integers(2, 5), st.data())
def test_after_a_handover_nothing_is_cold(replicas: int, data: st.DataObject) -> None:
    before = held(replicas, slots=len(MODELS))
    leaving = data.draw(st.sampled_from(before)).replica
    names = after_loss({one.place: one.replica for one in before}, leaving)
    found = to_load(before, names)
    ring = Ring(names)
    holds = {one.replica: {*one.models, *found.get(one.replica, [])} for one in before}
    for model in MODELS:
        home = ring.home(model)
        assert home is not None and model in holds[names[home]]
    assert leaving not in found


def test_with_nobody_left_there_is_nothing_to_load() -> None:
    assert to_load(held(2), {}) == {}


def test_a_handover_drives_out_nothing_that_is_asked_for_more() -> None:
    """The survivor has ten of its own in ten slots: of the other ten only what was used as lately comes."""
    mine, others = [f"a{number}" for number in range(10)], [f"b{number}" for number in range(10)]
    found = to_load([Held("A", 0, 10, mine), Held("B", 1, 10, others)], {0: "A"})
    assert found["A"] == others[:5]


def test_what_is_gone_takes_only_the_room_that_the_living_leave() -> None:
    living = [Held("r0", 0, 3, ["a", "b"])]
    gone = [Held("old", 0, 3, ["x", "y", "a"])]
    assert to_load(living, {0: "r0"}, None, gone) == {"r0": ["x"]}
    assert to_load([], {0: "new"}, None, gone) == {"new": ["x", "y", "a"]}
