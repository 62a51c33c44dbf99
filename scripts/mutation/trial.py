"""One run of pytest in a child of a fork server: on the sources as they are, or on one mutant.

The server has imported what is slow to import (torch, pytest) and nothing of the project, so a trial costs its
tests and little more. A child has a process group of its own, which ends with it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["Baseline", "Trial", "baseline", "trial", "warm_up"]

PYTEST: Final = (
    "pytest", "coverage", "hypothesis", "pytest_asyncio.plugin", "pytest_timeout", "schemathesis.pytest.plugin",
    "anyio.pytest_plugin", "anyio._backends._asyncio",
)  # fmt: skip
OURS: Final = (
    "numpy", "torch", "safetensors.torch", "boto3", "cachetools", "fastapi", "httpx", "moto.server", "orjson", "pydantic_settings",
    "uvicorn",
)  # fmt: skip
"""What our sources import, and is slow to."""

OPTIONS: Final = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
"""A plug-in of pytest's comes in with what is imported before; nobody needs its own asserts rewritten."""

EVERYWHERE: Final = "*"
"""Stands for all tests, where the tests of one file, or one test, could stand."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How a run of tests ended.

    Attributes
    ----------
    status
        ``passed``, ``failed``, ``timeout``, or ``broken`` when pytest could not run them.
    test
        The first that failed.
    output
        What pytest said.
    """

    status: str
    test: str
    seconds: float
    output: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """The tests on the unchanged sources.

    Attributes
    ----------
    durations
        Seconds of each test, by its id.
    lines
        For each line of the module that tests ran: which. A file stands for all its tests where a fixture that
        several share ran it, ``EVERYWHERE`` for all where importing did.
    """

    trial: Trial
    durations: dict[str, float] = field(default_factory=dict)
    lines: dict[int, frozenset[str]] = field(default_factory=dict)

    def tests_for(self, first: int, last: int) -> list[str]:
        """Tests that run any of these lines, the fastest first."""
        who = {name for line in range(first, last + 1) for name in self.lines.get(line, ())}
        tests = [
            one for one in self.durations if EVERYWHERE in who or one in who or one.split("::")[0] in who
        ]
        return sorted(tests, key=lambda one: self.durations[one])


def warm_up(root: Path) -> Any:
    """The context whose children are cheap, for the tests of this tree. Call once, before any trial."""
    context = multiprocessing.get_context("forkserver")
    ours = OURS if (root / "platform" / "flatshare").is_dir() else ()
    context.set_forkserver_preload([*PYTEST, *ours])
    return context


def baseline(context: Any, copy: Path, module: Path, tests: Sequence[str], timeout_s: float) -> Baseline:
    """Run all tests once, and note which line of the module each of them runs."""
    answer = copy / "baseline.json"
    done = _in_child(
        context, _run_baseline, (str(copy), str(module), list(tests), str(answer)), copy, timeout_s
    )
    if done.status != "passed":
        return Baseline(done)
    found = json.loads(answer.read_text())
    lines = {int(line): frozenset(names) for line, names in found["lines"].items()}
    return Baseline(done, found["durations"], lines)


def trial(context: Any, copy: Path, tests: Sequence[str], timeout_s: float) -> Trial:
    """Run these tests, in this order, to the first that fails."""
    return _in_child(context, _run_trial, (str(copy), list(tests)), copy, timeout_s)


def _in_child(context: Any, work: Any, arguments: tuple[Any, ...], copy: Path, timeout_s: float) -> Trial:
    told, output = copy / "failed.txt", copy / "output.txt"
    told.unlink(missing_ok=True)
    child = context.Process(target=_begin, args=(work, arguments, str(output)))
    began = time.monotonic()
    child.start()
    try:
        child.join(timeout_s)
        ended = child.exitcode is not None
    finally:
        _end(child)
    seconds = time.monotonic() - began
    said = output.read_text(errors="replace") if output.exists() else ""
    if not ended:
        return Trial("timeout", "", seconds, said)
    status = {0: "passed", 1: "failed"}.get(child.exitcode, "broken")
    return Trial(status, told.read_text() if told.exists() else "", seconds, said)


def _end(child: multiprocessing.process.BaseProcess) -> None:
    """End a child and whatever it started."""
    if child.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        if child.is_alive():
            child.kill()
        child.join()


# -- in the child


def _begin(work: Any, arguments: tuple[Any, ...], output: str) -> None:
    os.setsid()
    gc.freeze()  # what the server imported is nobody's garbage: pytest collects several times
    with open(output, "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115  # for as long as the child lives
    code = work(*arguments)
    sys.stdout.flush()
    os._exit(code)  # not by the threads that a broken module left


def _pytest(copy: str, arguments: Sequence[str], plugin: object) -> int:
    ours = [name for name in sys.modules if name.split(".")[0] in ("flatshare", "flatshare_registry")]
    assert not ours, f"imported before the change: {ours}"
    roots = [copy, f"{copy}/platform", f"{copy}/registry"]
    sys.path[:0] = roots
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)
    os.environ["PYTHONHASHSEED"] = "0"
    os.chdir(copy)
    import pytest

    return int(pytest.main([*OPTIONS, *arguments], plugins=[plugin]))


class _Order:
    """Tests in the order in which they were asked for, and the name of the first that fails."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._places = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self._places]
        items.sort(key=lambda item: self._places[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        told = Path("failed.txt")
        if report.failed and not told.exists():
            told.write_text(report.nodeid)


def _run_trial(copy: str, tests: Sequence[str]) -> int:
    sys.dont_write_bytecode = True  # a change within a second and of equal size would not be seen
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    return _pytest(copy, ["-x", *files], _Order(tests))


class _Watch:
    """Which test runs when, for the coverage of one module, and how long each takes."""

    def __init__(self, coverage: Any) -> None:
        self._coverage = coverage
        self._wide: list[str] = []
        self.durations: dict[str, float] = {}

    def _switch(self, context: str) -> None:
        self._coverage.switch_context(context)

    def _around(self, item: Any) -> Iterator[None]:
        self._switch(item.nodeid)
        yield
        self._switch(EVERYWHERE)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration


def _run_baseline(copy: str, module: str, tests: Sequence[str], answer: str) -> int:
    import coverage
    import pytest

    watched = coverage.Coverage(data_file=None, include=[module], config_file=False, messages=False)

    class Watch(_Watch):
        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
            yield from self._around(item)

        @pytest.hookimpl(hookwrapper=True)
        def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
            item = request._pyfuncitem.nodeid
            if fixturedef.scope != "function":
                self._switch(EVERYWHERE if fixturedef.scope == "session" else item.split("::")[0])
            yield
            self._switch(item)

    watch = Watch(watched)
    watched.start()
    watched.switch_context(EVERYWHERE)
    code = _pytest(copy, list(tests), watch)
    watched.stop()
    by_line = watched.get_data().contexts_by_lineno(module)
    lines = {line: sorted(filter(None, names)) for line, names in by_line.items()}
    Path(answer).write_text(json.dumps({"durations": watch.durations, "lines": lines}))
    return code
