"""The ledger: counts that are exact, and victims that are enough and not more."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatshare.residency.ledger import Ledger
from flatshare.weights.tiers import Part


def parts(names: str, size: int = 10) -> dict[Part, int]:
    return {Part(name, "F32", ()): size for name in names}


def resident(ledger: Ledger, names: str) -> dict[Part, int]:
    held = parts(names)
    ledger.settle(ledger.reserve(ledger.missing_bytes(held)), held)
    return held


def test_a_reservation_counts_until_it_is_settled_or_cancelled() -> None:
    ledger = Ledger(2, 100)
    reservation = ledger.reserve(60)
    assert (ledger.slots_taken, ledger.reserved_bytes, ledger.fits(1, 41)) == (1, 60, False)
    assert not ledger.grow(reservation, 101)
    assert ledger.grow(reservation, 80)
    ledger.settle(reservation, parts("ab", 30))
    assert (ledger.slots_taken, ledger.reserved_bytes, ledger.held_bytes) == (1, 0, 60)
    with pytest.raises(AssertionError, match="ends once"):
        ledger.cancel(reservation)
    ledger.cancel(ledger.reserve(40))
    assert (ledger.slots_taken, ledger.reserved_bytes, ledger.held_bytes) == (1, 0, 60)


def test_more_than_was_reserved_can_not_be_settled() -> None:
    ledger = Ledger(2, 100)
    with pytest.raises(AssertionError, match="more than was reserved"):
        ledger.settle(ledger.reserve(10), parts("ab"))


def test_a_victim_whose_parts_others_hold_frees_nothing() -> None:
    ledger = Ledger(10, 40)
    sharers = [resident(ledger, "xa"), resident(ledger, "xb"), resident(ledger, "xc")]
    assert ledger.held_bytes == 40
    # 30 bytes come free only when all three go: x is held by each of them.
    assert ledger.choose_victims(sharers, 40) == [0, 1, 2]
    assert ledger.choose_victims(sharers, 20) == [0, 1]
    assert ledger.choose_victims(sharers[:1], 20) is None


def test_what_the_new_model_needs_too_is_not_counted_as_freed() -> None:
    ledger = Ledger(10, 30)
    victim = resident(ledger, "xyz")
    assert ledger.choose_victims([victim], 20, keep=parts("x")) == [0]
    assert ledger.choose_victims([victim], 30, keep=parts("x")) is None


sets = st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1, max_size=4), min_size=1, max_size=5)


@given(
    sets,
    st.sets(st.sampled_from("abcdefghij"), min_size=1, max_size=5),
    st.integers(10, 90),
    st.integers(1, 6),
)
def test_the_choice_is_enough_needed_and_found_if_there_is_one(
    held: list[set[str]], wanted: set[str], budget: int, slots: int
) -> None:
    ledger = Ledger(slots, budget)
    residents = []
    for one in held:
        new = parts("".join(sorted(one)))
        if ledger.fits(1, ledger.missing_bytes(new)):
            residents.append(resident(ledger, "".join(sorted(one))))
    new = parts("".join(sorted(wanted)))

    def enough(gone: tuple[int, ...]) -> bool:
        left = [one for index, one in enumerate(residents) if index not in gone]
        together = {part for one in left for part in one} | set(new)
        return len(left) + 1 <= slots and 10 * len(together) <= budget

    chosen = ledger.choose_victims(residents, ledger.missing_bytes(new), keep=new)
    every = [
        gone for n in range(len(residents) + 1) for gone in itertools.combinations(range(len(residents)), n)
    ]
    if chosen is None:
        assert not any(enough(gone) for gone in every)
    else:
        assert enough(tuple(chosen))
        assert not any(enough(tuple(x for x in chosen if x != one)) for one in chosen)
