"""The map of copies: rows dealt out evenly, and read back as they were written."""

from __future__ import annotations

from collections import Counter

import pytest

from flatshare.edge.copies import COPY_ROWS, map_text, parse_map, replace_map, rows


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 12, 40])
def test_every_copy_gets_its_share(count: int) -> None:
    found = rows({"acme": tuple(range(10, 10 + count))})
    assert found.pop("acme") == str(count)
    assert set(found) == {f"acme/{number}" for number in range(COPY_ROWS)}
    shares = Counter(found.values())
    assert set(shares) == {f"p{place}" for place in range(10, 10 + count)}
    assert max(shares.values()) - min(shares.values()) <= 1


def test_a_model_that_was_moved_has_one_row() -> None:
    assert rows({"acme": (3,), "other": ()}) == {"acme": "p3"}


def test_what_was_written_is_read_back() -> None:
    wanted = rows({"acme:canary": (0, 1), "b@7": (1, 2)})
    said = "".join(f"0x5581f0 {line}\n" for line in map_text(wanted).splitlines())
    assert parse_map(said) == wanted
    assert parse_map("\n") == {}


def test_the_map_changes_as_a_whole() -> None:
    told = replace_map(5, {"a": "2", "a/0": "p1"})
    assert told == [
        "add map @5 copies.map <<\na 2\na/0 p1\n", "commit map @5 copies.map",
    ]  # fmt: skip
