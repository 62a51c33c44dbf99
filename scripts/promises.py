"""Breaks each promise on purpose, in a child process, and sees its test fail; without the break it must pass.

A promise whose test passes with the promise broken is not tested; a break that did not apply, or whose function was
never called, proves nothing. This says which, and ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from promise_breaks import BREAKS, OWN_FAULTS
from promise_plugin import Break

from flatshare.cli.output import err, print_table

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--promise", action="append", help="only this one: a number or a word (repeatable)")
    arguments = parser.parse_args()
    chosen = [one for one in BREAKS if not arguments.promise or one.promise in arguments.promise]
    if not chosen:
        parser.error(f"there is none of these; there are {sorted({one.promise for one in BREAKS})}")
    whole = passes_whole(chosen)
    err.print(f"nothing broken: {whole or 'all of these tests pass'}")
    rows: list[tuple[object, ...]] = []
    for one in chosen:
        said = is_found(one)
        err.print(f"promise {one.name}: {said or 'found'}")
        rows.append(
            (one.promise, one.what, said.partition(":")[0] or "found", ", ".join(one.patches), one.test)
        )
    print_table("", ["promise#", "broken on purpose", "", "function", "test"], rows)
    return 1 if whole or any(row[2] != "found" for row in rows) else 0


def run(tests: list[str], broken: Break | None) -> tuple[dict[str, object], str]:
    """What the plugin saw in a child's tests, and the child's output."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMISE_")}
        environment["PROMISE_REPORT"] = str(report)
        paths = [
            str(SCRIPTS),
            str(ROOT / "platform"),
            str(ROOT / "registry"),
            environment.get("PYTHONPATH", ""),
        ]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if broken is not None:
            environment["PROMISE_BREAK"] = broken.name
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "promise_plugin", "-p", "no:cacheprovider", "--timeout", "60", *tests],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return (json.loads(report.read_text()) if report.exists() else {}), done.stdout + done.stderr


def passes_whole(chosen: list[Break]) -> str:
    """Empty when all the tests pass with nothing broken, else what is wrong."""
    seen, output = run(sorted({one.test for one in chosen}), None)
    if seen.get("failed") or not seen.get("passed"):
        return f"TESTS FAIL WITH NOTHING BROKEN: {seen.get('failed')} {output[-1500:]}"
    return ""


def is_found(one: Break) -> str:
    """Empty when the test finds the break, else why that is not so."""
    seen, output = run([one.test], one)
    if "not_applied" in seen:
        return f"NOT APPLIED: {seen['not_applied']}"
    if not seen:
        return f"PYTEST DID NOT RUN: {output[-1500:]}"
    calls, failed = seen["calls"], seen["failed"]
    assert isinstance(calls, dict)
    assert isinstance(failed, list)
    never = [target for target, count in calls.items() if not count]
    if never:
        return f"NEVER CALLED: {', '.join(never)}"
    by = {kind for _, _, kind in failed}
    if not failed:
        return "NOT FOUND"
    return "" if by - OWN_FAULTS else f"THE BREAK ITSELF FAILED: {', '.join(sorted(by))}: {output[-1500:]}"


if __name__ == "__main__":
    sys.exit(main())
