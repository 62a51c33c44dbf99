"""Homes on the ring: spread, stable, and moved only by who comes or goes. That it is HAProxy's: tests/contract."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatshare.placement.ring import MAX_PLACES, Ring, server_id

MODELS = [f"tenant-{number}" for number in range(2000)]
PLACES = st.sets(st.integers(0, 40), min_size=1, max_size=8)


def homes(places: set[int]) -> dict[str, int | None]:
    ring = Ring(places)
    return {model: ring.home(model) for model in MODELS[:400]}


def test_models_spread_evenly() -> None:
    ring = Ring(range(4))
    shares = Counter(ring.home(model) for model in MODELS)
    assert len(shares) == 4 and max(shares.values()) < 1.15 * len(MODELS) / 4


@given(PLACES, st.integers(0, 40))
def test_who_comes_takes_a_fair_share_and_nobody_else_moves(places: set[int], newcomer: int) -> None:
    before, after = homes(places - {newcomer} or {99}), homes((places - {newcomer} or {99}) | {newcomer})
    moved = {model for model in before if before[model] != after[model]}
    assert all(after[model] == newcomer for model in moved)
    assert len(moved) <= 2 * len(before) / (len(places - {newcomer} or {99}) + 1)


def test_a_replacement_gets_its_places_models_back() -> None:
    before = homes({0, 1, 2, 3})
    homes({0, 2, 3})
    assert homes({0, 1, 2, 3}) == before


@given(PLACES, st.sampled_from(MODELS))
def test_homes_are_all_places_once_and_begin_with_the_home(places: set[int], model: str) -> None:
    ring = Ring(places)
    found = ring.homes(model)
    assert sorted(found) == sorted(places)
    assert found[0] == ring.home(model) and found[:2] == ring.homes(model, 2)
    assert ring.homes(f"{model}:production") == found


def test_a_ring_without_places_has_no_home() -> None:
    assert Ring(()).home("acme") is None
    assert Ring(()).homes("acme") == []
    assert Ring((3,)).homes("acme", 0) == []


@pytest.mark.parametrize("places", [[-1], [MAX_PLACES]])
def test_a_place_that_the_ring_has_no_room_for_is_refused(places: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to"):
        Ring(places)


def test_no_place_has_the_id_that_haproxy_takes_for_none() -> None:
    assert server_id(0) == 1
