"""Each promise of the cache, broken on purpose, is found by its test (``scripts/promises``)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "promises", Path(__file__).parents[2] / "scripts" / "promises.py"
)
assert _SPEC is not None and _SPEC.loader is not None
promises = importlib.util.module_from_spec(_SPEC)
sys.modules["promises"] = promises
_SPEC.loader.exec_module(promises)


@pytest.mark.parametrize("mutation", promises.MUTATIONS, ids=lambda one: f"{one.promise}: {one.what}")
def test_a_broken_promise_is_found(mutation) -> None:  # type: ignore[no-untyped-def]  # loaded from a script
    assert promises.is_found(mutation)


def test_every_promise_of_the_design_is_broken_once() -> None:
    assert {one.promise for one in promises.MUTATIONS} == set(range(1, 13))
