"""Each promise, broken on purpose, is found by its test (``scripts/promises``)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


plugin = _script("promise_plugin")
breaks = _script("promise_breaks")
promises = _script("promises")
BREAKS = breaks.BREAKS


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_what_is_broken_is_there_and_takes_what_its_replacement_takes(one) -> None:  # type: ignore[no-untyped-def]  # loaded from a script
    for target, replacement in one.patches.items():
        plugin.check(target, replacement)
    file = Path(__file__).parents[2] / one.test.partition("::")[0]
    assert f"def {one.test.partition('::')[2]}" in file.read_text()


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_a_broken_promise_is_found(one) -> None:  # type: ignore[no-untyped-def]  # loaded from a script
    assert promises.is_found(one) == ""


def test_every_promise_of_the_design_is_broken_once() -> None:
    assert {one.promise for one in BREAKS} >= {str(number) for number in range(1, 13)}
    assert len({one.name for one in BREAKS}) == len(BREAKS)


async def _awaited(original: object, self: object, key: object) -> None:
    pass


@pytest.mark.parametrize(
    ("target", "replacement", "said"),
    [
        ("flatshare.residency.lease:Lease.is_whole", breaks.intact, "there is no"),
        ("flatshare.residency.leases:Lease.is_intact", breaks.intact, "there is no"),
        ("flatshare.residency.lease:_Lease.is_intact", breaks.nothing, "there is no"),
        ("flatshare.residency.lease:Lease.model", breaks.nothing, "not a function"),
        ("flatshare.residency.lease:Lease.is_intact", breaks.deleted, "takes"),
        ("flatshare.residency.residency:Residency._evictable", _awaited, "coroutine"),
    ],
)
def test_a_break_that_fits_no_more_is_said_so(target: str, replacement: object, said: str) -> None:
    with pytest.raises(plugin.NotApplied, match=said):
        plugin.check(target, replacement)


@pytest.mark.parametrize("said", breaks.PROVE_NOTHING)
def test_a_break_that_proves_nothing_does_not_count(said: str) -> None:
    assert promises.is_found(breaks.PROVE_NOTHING[said]).startswith(said)
