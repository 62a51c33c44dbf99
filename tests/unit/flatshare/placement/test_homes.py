"""Ranks of replicas: a home, a bound, warmth, and always everybody last."""

from hypothesis import given
from hypothesis import strategies as st

from flatshare.placement.homes import rank

ORDER = ["a", "b", "c"]
CAPACITY = dict.fromkeys(ORDER, 10)


def test_the_home_comes_first() -> None:
    assert rank(ORDER, set(), {}, CAPACITY, 1.5) == [["a"], ["b"], ["c"], ORDER]


def test_a_warm_one_comes_before_a_cold_home() -> None:
    assert rank(ORDER, {"c"}, {}, CAPACITY, 1.5)[0] == ["c"]
    assert rank(ORDER, {"a", "c"}, {}, CAPACITY, 1.5)[0] == ["a"]


def test_an_overloaded_home_spills() -> None:
    ranks = rank(ORDER, {"a"}, {"a": 9, "b": 0, "c": 0}, CAPACITY, 1.5)
    assert ranks[0] == ["b"]
    assert ["a"] not in ranks[:-1]


def test_a_full_replica_is_only_in_the_last_rank() -> None:
    assert rank(ORDER, {"a"}, {"a": 2}, {"a": 2, "b": 5, "c": 5}, 100.0)[:2] == [["b"], ["c"]]


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True),
    st.data(),
    st.floats(1.0, 4.0),
)
def test_ranks_are_never_empty_and_end_with_everybody(
    order: list[str], data: st.DataObject, factor: float
) -> None:
    queued = {name: data.draw(st.integers(0, 20)) for name in order}
    warm = set(data.draw(st.lists(st.sampled_from(order))))
    ranks = rank(order, warm, queued, dict.fromkeys(order, 10), factor)
    assert ranks[-1] == order
    assert all(ranks)
    assert len(ranks) == len({tuple(one) for one in ranks}) or len(order) == 1
    assert len(ranks) <= 5
