"""How many consumers waiting tasks get: by their number, by their age, within bounds, without flapping."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flatshare.placement.consumers import OLD_S, ROUNDS, Backlog, consumer_wish
from flatshare.placement.scaling import Bounds, Wish, decide_replicas

BOUNDS = Bounds(0, 6, upscale_delay_s=2, downscale_delay_s=60, idle_s=60)
AT_A_TIME = 4


def wished(backlog: Backlog, quiet_s: float = 0.0, bounds: Bounds = BOUNDS) -> int:
    return consumer_wish(0.0, backlog, AT_A_TIME, bounds, quiet_s).replicas


def test_by_number_and_by_age() -> None:
    young, old = Backlog(AT_A_TIME * 2, 4, 1.0), Backlog(AT_A_TIME * 2, 4, OLD_S + 1)
    assert (wished(young), wished(old)) == (1, 3)
    assert wished(Backlog(AT_A_TIME * ROUNDS + 1, 0, 0.0)) == 2
    assert wished(Backlog(10_000, 0, 0.0)) == 6


def test_none_only_after_a_quiet_while_and_within_the_bounds() -> None:
    assert (wished(Backlog(), 59), wished(Backlog(), 61)) == (1, 0)
    assert wished(Backlog(), 61, Bounds(1, 6, idle_s=60)) == 1
    assert wished(Backlog(1, 0, 0.0), 61) == 1
    assert wished(Backlog(held=300), 61) == 1, "what is held back needs one to hold it, and no more"


backlogs = st.builds(Backlog, st.integers(0, 500), st.integers(0, 24), st.floats(0, 100))


@given(backlogs, st.integers(1, 20), st.floats(0, 100))
def test_more_tasks_never_want_fewer(backlog: Backlog, more: int, quiet_s: float) -> None:
    grown = Backlog(backlog.due + more, backlog.under_way, backlog.oldest_s)
    assert wished(grown, quiet_s) >= wished(backlog, quiet_s)
    assert 0 <= wished(backlog, quiet_s) <= 6


@given(backlogs)
def test_the_same_backlog_changes_the_number_once_at_most_each_way(backlog: Backlog) -> None:
    current, wishes, seen = 1, (), [1]
    for second in range(300):
        wishes = (*wishes, Wish(second, wished(backlog)))
        new, wishes = decide_replicas(second, current, wishes, BOUNDS)
        if new != current:
            current, wishes = new, ()
            seen.append(new)
    assert len(seen) <= 2 and seen[-1] == wished(backlog)
