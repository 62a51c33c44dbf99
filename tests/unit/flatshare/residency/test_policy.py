"""Policies: the order of victims, and that looking changes nothing."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from flatshare.residency.policy import POLICIES, EvictionPolicy, LeastRecentlyUsed, Sieve
from flatshare.weights.tiers import ModelKey


def key(number: int) -> ModelKey:
    return ModelKey(f"t{number}", 1)


def filled(policy: EvictionPolicy, count: int = 4) -> EvictionPolicy:
    for number in range(count):
        policy.admitted(key(number))
    return policy


def hit_rate(policy: EvictionPolicy, trace: list[int], slots: int) -> float:
    held: set[ModelKey] = set()
    hits = 0
    for number in trace:
        one = key(number)
        if one in held:
            hits += 1
            policy.used(one)
            continue
        if len(held) == slots:
            victim = next(iter(policy.victims()))
            policy.removed(victim, evicted=True)
            held.discard(victim)
        held.add(one)
        policy.admitted(one)
    return hits / len(trace)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_names_every_resident_once_and_looking_changes_nothing(name: str) -> None:
    policy = filled(POLICIES[name]())
    policy.used(key(1))
    first = list(policy.victims())
    assert sorted(first) == [key(number) for number in range(4)]
    assert list(policy.victims()) == first
    policy.removed(key(2), evicted=False)
    assert sorted(policy.victims()) == [key(0), key(1), key(3)]


def test_lru_goes_by_the_last_use() -> None:
    policy = filled(LeastRecentlyUsed())
    policy.used(key(0))
    assert list(policy.victims()) == [key(1), key(2), key(3), key(0)]


def test_lru_is_an_lru() -> None:
    trace = random.Random(1).choices(range(50), weights=[1 / (n + 1) for n in range(50)], k=3000)
    reference: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in trace:
        hits += number in reference
        reference[number] = None
        reference.move_to_end(number)
        if len(reference) > 10:
            reference.popitem(last=False)
    assert hit_rate(LeastRecentlyUsed(), trace, 10) == hits / len(trace)


def test_the_sieves_hand_takes_marks_away_and_goes_on_where_it_stopped() -> None:
    policy = filled(Sieve())
    for number in (0, 1):
        policy.used(key(number))
    assert next(iter(policy.victims())) == key(2)
    policy.removed(key(2), evicted=True)  # the hand passed 0 and 1 and took their marks
    policy.admitted(key(4))
    assert list(policy.victims()) == [key(3), key(4), key(0), key(1)]
    policy.removed(key(3), evicted=True)
    policy.used(key(4))
    assert next(iter(policy.victims())) == key(0)


def test_the_sieve_keeps_what_is_used_again_from_a_scan() -> None:
    random_ = random.Random(2)
    trace = []
    for number in range(4000):
        trace.append(random_.randrange(8))
        trace.append(1000 + number)  # every other request is for a model that is never used again
    lru, sieve = (hit_rate(POLICIES[name](), trace, 10) for name in ("lru", "sieve"))
    assert sieve > 0.49  # of at most 0.5
    assert lru < 0.4
