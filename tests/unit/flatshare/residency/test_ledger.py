"""The ledger: counts that are exact, and victims that are enough and not more."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatshare.residency.ledger import RAISING_STEPS, Ledger
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


def test_what_exactly_fits_fits_and_a_byte_or_a_slot_more_does_not() -> None:
    ledger = Ledger(2, 100)
    assert ledger.fits(2, 100)
    assert not ledger.fits(3, 0) and not ledger.fits(0, 101)
    reservation = ledger.reserve(40)
    resident(ledger, "abc")
    assert (ledger.slots_taken, ledger.reserved_bytes, ledger.held_bytes) == (2, 40, 30)
    assert ledger.fits(0, 30) and not ledger.fits(0, 31) and not ledger.fits(1, 0)
    assert ledger.grow(reservation, 70) and not ledger.grow(reservation, 71)
    assert reservation.bytes == ledger.reserved_bytes == 70


def test_without_a_bound_only_slots_run_out() -> None:
    ledger = Ledger(1, None)
    assert ledger.fits(1, 10**15) and not ledger.fits(2, 0)
    victim = resident(ledger, "a")
    assert ledger.choose_victims([victim], 10**15) == [0], "its slot is wanted"
    assert ledger.choose_victims([victim], 10**15, slots=0) == []
    assert ledger.choose_victims([victim], 0, slots=2) is None


def test_a_load_that_turned_out_smaller_gives_bytes_back() -> None:
    ledger = Ledger(1, 100)
    reservation = ledger.reserve(100)
    assert ledger.grow(reservation, 30)
    assert (reservation.bytes, ledger.reserved_bytes) == (30, 30)
    assert ledger.fits(0, 70) and not ledger.fits(0, 71)
    ledger.cancel(reservation)
    assert (ledger.slots_taken, ledger.reserved_bytes) == (0, 0)


def test_a_reservation_ends_once_however_it_ends() -> None:
    ledger = Ledger(3, 100)
    cancelled, settled = ledger.reserve(10), ledger.reserve(10)
    ledger.cancel(cancelled)
    ledger.settle(settled, parts("a"))
    for reservation in (cancelled, settled):
        with pytest.raises(AssertionError, match="ends once"):
            ledger.cancel(reservation)
        with pytest.raises(AssertionError, match="ends once"):
            ledger.settle(reservation, parts("a"))
    assert (ledger.slots_taken, ledger.reserved_bytes, ledger.held_bytes) == (1, 0, 10)


def test_a_part_counts_once_until_its_last_holder_lets_go() -> None:
    ledger = Ledger(3, 100)
    first, second = resident(ledger, "xa"), resident(ledger, "xb")
    assert (ledger.held_bytes, ledger.own_bytes(first), ledger.own_parts(first)) == (30, 10, list(parts("a")))
    assert ledger.missing_bytes(parts("xabc")) == 10
    ledger.drop(first)
    ledger.free_slot()
    assert (ledger.slots_taken, ledger.held_bytes) == (1, 20)
    assert ledger.missing_bytes(first) == 10 and ledger.own_bytes(second) == 20
    present = ledger.hold_present(parts("xac"))
    assert present == parts("x") and ledger.held_bytes == 20, "only what is there"
    ledger.drop(second)
    assert ledger.held_bytes == 10, "x has a holder yet"
    ledger.drop(present)
    assert ledger.held_bytes == 0


def test_of_victims_that_do_not_help_the_most_recently_used_are_spared_first() -> None:
    ledger = Ledger(10, 40)
    victims = [resident(ledger, names) for names in ("a", "b", "cd")]
    assert ledger.choose_victims(victims, 30) == [0, 2], "either of the first two would do"
    assert ledger.choose_victims(victims, 20) == [0, 1]
    assert ledger.choose_victims(victims, 0) == [], "there is room"
    assert ledger.held_bytes == 40, "it was a thought"


def test_a_victim_whose_slot_is_needed_is_not_spared_although_its_bytes_are_not() -> None:
    ledger = Ledger(3, 100)
    victims = [resident(ledger, names) for names in "abc"]
    assert ledger.choose_victims(victims, 0, slots=2) == [0, 1]
    assert ledger.choose_victims(victims, 90, slots=2) == [0, 1]
    assert ledger.choose_victims(victims, 100, slots=2) == [0, 1, 2]


def test_bytes_that_are_reserved_are_nobodys_to_take() -> None:
    ledger = Ledger(10, 50)
    ledger.reserve(20)
    victims = [resident(ledger, "a"), resident(ledger, "bc")]
    assert ledger.choose_victims(victims, 30) == [0, 1]
    assert ledger.choose_victims(victims, 31) is None


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


def test_what_a_device_refused_lowers_the_limit_for_a_while_and_never_the_budget() -> None:
    ledger = Ledger(100, 1000)
    models = [parts(name, 100) for name in "abc"]
    for one in models:
        ledger.settle(ledger.reserve(100), one)
    ledger.lower()
    assert (ledger.limit_bytes, ledger.fits(1, 1), ledger.fits(1, 700, whole=True)) == (300, False, True)
    assert ledger.choose_victims(models, 301) is None
    assert ledger.choose_victims(models, 301, whole=True) == []
    assert ledger.choose_victims(models, 100) == [0]
    limits = []
    for _ in range(RAISING_STEPS):
        ledger.raise_again()
        limits.append(ledger.limit_bytes)
    assert limits == sorted(limits) and limits[0] < 400 and limits[-1] == 1000
    assert not ledger.restore()
    ledger.lower()
    assert ledger.restore() and ledger.limit_bytes == 1000
