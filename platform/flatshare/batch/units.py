"""The order of a batch's work: rows of one file and model together, so that a model is loaded once a file.
Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_ROWS", "Unit", "units_of"]

MOST_ROWS: Final = 4096
"""Rows of one unit: a second of work of one core, and 13 MB of MNIST's rows."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of one file and of one model.

    Attributes
    ----------
    version
        ``acme@7``.
    file
        Its number in the input.
    first
        Number of the file's first row in the whole input.
    numbers
        Of the rows, within the file; ascending.
    once
        There is no other unit of this version.
    """

    version: str
    file: int
    first: int
    numbers: NDArray[np.int64]
    once: bool = False


def units_of(
    files: Sequence[int], versions: str | tuple[NDArray[Any], Mapping[str, str]], done: NDArray[np.bool_]
) -> list[Unit]:
    """The rows that are left to do, as units: file by file, those of one model after each other.

    Parameters
    ----------
    files
        How many rows each file has.
    versions
        Of all rows; or each row's ref, and the version of each ref.
    done
        Whether a row's result is there already.
    """
    found: list[Unit] = []
    first = 0
    for file, count in enumerate(files):
        left = np.flatnonzero(~done[first : first + count]).astype(np.int64)
        if isinstance(versions, str):
            groups = [(versions, left)] if len(left) else []
        else:
            refs = versions[0][first : first + count][left]
            order = np.argsort(refs, kind="stable")
            names, starts = np.unique(refs[order], return_index=True)
            parts = np.split(left[order], starts[1:]) if len(names) else []
            groups = [(versions[1][str(name)], part) for name, part in zip(names, parts, strict=True)]
        for version, numbers in groups:
            found += [
                Unit(version, file, first, numbers[start : start + MOST_ROWS])
                for start in range(0, len(numbers), MOST_ROWS)
            ]
        first += count
    units = Counter(unit.version for unit in found)
    return [replace(unit, once=units[unit.version] == 1) for unit in found]
