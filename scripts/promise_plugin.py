"""A pytest plugin that breaks a promise: ``-p promise_plugin``, in a child process (``promises.py``).

Puts the replacements of the break that ``PROMISE_BREAK`` names in place of their functions, counts their calls, and
writes what it saw to ``PROMISE_REPORT``. A function that is not there any more, or takes other arguments, is said so
at once and nothing is run.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Replacement = Callable[..., Any]
"""Takes the original first, then what the original takes, by the same names."""


@dataclass(frozen=True)
class Break:
    """One promise, broken.

    Attributes
    ----------
    promise
        Its number in platform/DESIGN.md, or a word for what the README promises beside these.
    patches
        By the qualified name of a function, ``module:Class.function``: in the module in which it is looked up.
    test
        Must fail.
    """

    promise: str
    what: str
    patches: Mapping[str, Replacement]
    test: str

    @property
    def name(self) -> str:
        return f"{self.promise}: {self.what}"


class NotApplied(Exception):
    """A function to replace is not there any more, or takes other arguments."""


# -- applying


def find(target: str) -> tuple[Any, str, Callable[..., Any]]:
    """Who owns a function, its name there, and the function.

    Raises
    ------
    NotApplied
        There is none of this name.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        return owner, name, vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise NotApplied(f"there is no {target} any more: {error!r}") from None


def check(target: str, replacement: Replacement) -> None:
    """Refuse a replacement that does not take what its function takes.

    Raises
    ------
    NotApplied
        The function is gone or has changed: the break must be thought over, not only renamed.
    """
    _, _, original = find(target)
    if not callable(original):
        raise NotApplied(f"{target} is not a function any more")
    taken = {name: one.kind for name, one in inspect.signature(original).parameters.items()}
    _, *rest = inspect.signature(replacement).parameters.values()  # without the original
    given = {one.name: one.kind for one in rest}
    if inspect.Parameter.VAR_KEYWORD not in given.values() and taken != given:
        raise NotApplied(f"{target} takes {list(taken)}; its replacement takes {list(given)}")
    if inspect.iscoroutinefunction(original) != inspect.iscoroutinefunction(replacement):
        raise NotApplied(f"{target} is a coroutine and its replacement is not, or the other way round")


def apply(one: Break) -> dict[str, int]:
    """Put the replacements in place; returns their calls, counted from now on.

    Raises
    ------
    NotApplied
        One does not fit. Then none is in place.
    """
    for target, replacement in one.patches.items():
        check(target, replacement)
    calls = dict.fromkeys(one.patches, 0)
    for target, replacement in one.patches.items():
        owner, name, original = find(target)
        setattr(owner, name, _counting(target, original, replacement, calls))
    return calls


def _counting(target: str, original: Any, replacement: Replacement, calls: dict[str, int]) -> Any:
    @functools.wraps(original)
    def replaced(*arguments: Any, **named: Any) -> Any:
        calls[target] += 1
        return replacement(original, *arguments, **named)

    return replaced


# -- the plugin

_seen: dict[str, Any] = {"calls": {}, "failed": [], "passed": 0}


def pytest_configure(config: pytest.Config) -> None:
    name = os.environ.get("PROMISE_BREAK")
    if name is None:
        return
    from promise_breaks import BREAKS, PROVE_NOTHING

    (one,) = [one for one in [*BREAKS, *PROVE_NOTHING.values()] if one.name == name]
    try:
        _seen["calls"] = apply(one)
    except NotApplied as error:
        _write({"not_applied": str(error)})
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    yield
    if call.when == "call" and call.excinfo is None:
        _seen["passed"] += 1
    elif call.excinfo is not None:
        _seen["failed"].append([item.name, call.when, call.excinfo.type.__name__])


def pytest_sessionfinish() -> None:
    _write(_seen)


def _write(report: Mapping[str, Any]) -> None:
    path = os.environ.get("PROMISE_REPORT")
    if path is not None:
        Path(path).write_text(json.dumps(report))
