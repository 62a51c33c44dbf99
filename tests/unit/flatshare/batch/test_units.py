"""Units: every row that is left is in one, with its own model, and rows of one model stand together."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flatshare.batch.units import MOST_ROWS, units_of

FILES = st.lists(st.integers(0, 40), min_size=1, max_size=4)


@given(FILES, st.integers(0, 2**32 - 1))
def test_every_row_that_is_left_is_in_one_unit_with_its_model(files: list[int], seed: int) -> None:
    dice = np.random.default_rng(seed)
    total = sum(files)
    refs = np.array([f"t{n}" for n in dice.integers(0, 5, total)], object)
    versions = {f"t{n}": f"t{n}@{n + 1}" for n in range(5)}
    done = dice.random(total) < 0.3
    seen: dict[int, str] = {}
    for file, units in itertools.groupby(units_of(files, (refs, versions), done), lambda unit: unit.file):
        of_file = list(units)
        models = [unit.version for unit in of_file]
        assert len(set(models)) == len(list(itertools.groupby(models))), "of one model after each other"
        for unit in of_file:
            assert (np.diff(unit.numbers) > 0).all() and unit.numbers[-1] < files[file]
            for row in (unit.numbers + unit.first).tolist():
                assert row not in seen
                seen[row] = unit.version
    assert sorted(seen) == np.flatnonzero(~done).tolist()
    assert all(version == versions[refs[row]] for row, version in seen.items())


def test_long_files_are_cut_and_nothing_is_left_of_nothing() -> None:
    units = units_of([2 * MOST_ROWS + 1], "acme@1", np.zeros(2 * MOST_ROWS + 1, bool))
    assert [len(unit.numbers) for unit in units] == [MOST_ROWS, MOST_ROWS, 1]
    assert units_of([3], "acme@1", np.ones(3, bool)) == []
    assert units_of([0], "acme@1", np.zeros(0, bool)) == []


def test_a_version_of_one_unit_is_used_once() -> None:
    refs = np.array(["a", "b", "b", "a", "c"])
    units = units_of([3, 2], (refs, {"a": "a@1", "b": "b@1", "c": "c@1"}), np.zeros(5, bool))
    assert [(unit.version, unit.file, unit.once) for unit in units] == [
        ("a@1", 0, False), ("b@1", 0, True), ("a@1", 1, False), ("c@1", 1, True),
    ]  # fmt: skip
