"""LRU and Belady's bound, against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flatshare.simulation.references import belady_hits, lru_hits

traces = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(lambda found: np.array(found, np.int64))


@given(traces, st.integers(1, 4))
def test_lru_is_what_its_stack_distances_say(models: np.ndarray, slots: int) -> None:
    hits = lru_hits(models, slots)
    for number, model in enumerate(models.tolist()):
        before = [at for at in range(number) if models[at] == model]
        wanted = bool(before) and len(set(models[before[-1] : number].tolist())) <= slots
        assert hits[number] == wanted


def best(models: tuple[int, ...], held: frozenset[int], slots: int) -> int:
    """Most hits that any choice of victims has, by trying all."""
    if not models:
        return 0
    first, rest = models[0], models[1:]
    if first in held:
        return 1 + best(rest, held, slots)
    if len(held) < slots:
        return best(rest, held | {first}, slots)
    return max(best(rest, (held - {victim}) | {first}, slots) for victim in held)


@settings(max_examples=60, deadline=None)
@given(traces, st.integers(1, 3))
def test_belady_has_as_many_hits_as_any_choice_could_have(models: np.ndarray, slots: int) -> None:
    assert belady_hits(models, slots).sum() == best(tuple(models.tolist()), frozenset(), slots)


def test_they_are_fast_enough_for_millions() -> None:
    models = np.fromiter(itertools.islice(itertools.cycle(range(1000)), 50_000), np.int64)
    assert lru_hits(models, 999).sum() == 0, "a scan of one more than there is room for"
    assert belady_hits(models, 999).mean() > 0.95
