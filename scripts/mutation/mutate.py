"""Change one place of a module at a time, run its unit tests, and tell which changes nobody noticed.

``scripts/mutate platform/flatshare/engine/quotas.py --count 35 --seed 7``. Run by hand: a survivor is a question to
a person, so it is no gate of CI. Works on a copy of the sources. A change that no test can see is listed, with its
reason, in ``scripts/mutation/equivalent.toml`` and leaves the score.

Why not a tool of the shelf: mutmut's module names know only ``src`` layouts and it forks after torch has started
its threads; cosmic-ray has no dropped statement, which is what most holes here were; mutatest is not kept any more.
Which lines a test runs is asked of coverage.py, so that only tests that could notice a change are run for it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mutants import Equivalent, Mutant, mutants_of, read_equivalent, sort_out
from trial import Baseline, Trial, baseline, trial, warm_up

ROOT: Final = Path(__file__).parents[2]
EQUIVALENT: Final = Path(__file__).with_name("equivalent.toml")
PATIENCE: Final = 5.0
"""A mutant's tests may take this many times as long as they do on the unchanged sources."""

LEAST_S: Final = 20.0
"""And never less than this: the machine may be busy with something else."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one mutant."""

    mutant: Mutant
    status: str
    test: str

    @property
    def killed(self) -> bool:
        """Whether the tests noticed: one failed, nothing ended, or the module could not even be imported."""
        return self.status != "survived"


@dataclass(frozen=True, slots=True)
class Report:
    """A module's mutants."""

    file: str
    seed: int
    verdicts: list[Verdict]
    tried_of: int
    equivalent: int
    stale: list[Equivalent]

    @property
    def killed(self) -> int:
        """How many were noticed."""
        return sum(one.killed for one in self.verdicts)

    @property
    def score(self) -> float:
        """The part of the tried ones that was noticed."""
        return self.killed / len(self.verdicts) if self.verdicts else 1.0


def mutate(
    root: Path, file: str, tests: list[str], *, count: int, seed: int, time_limit_s: float,
    equivalent: list[Equivalent], progress: Any, lines: list[int] | None = None,
) -> Report:  # fmt: skip
    """Try ``count`` changes of one module, drawn with ``seed``.

    Parameters
    ----------
    root
        With ``platform``, ``registry``, ``tests`` and ``pyproject.toml``: only read.
    file, tests
        Relative to it.
    progress
        Called with how many are done, of how many, and the last verdict.

    Raises
    ------
    SystemExit
        The tests do not pass as they are.
    """
    source = (root / file).read_text()
    candidates, same, stale = sort_out(mutants_of(source), file, equivalent)
    chosen = candidates = [one for one in candidates if not lines or one.line in lines]
    if len(candidates) > count:
        chosen = sorted(random.Random(seed).sample(candidates, count), key=lambda one: one.line)
    deadline = time.monotonic() + time_limit_s
    verdicts: list[Verdict] = []
    context = warm_up(root)
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder).resolve()
        for part in ("platform", "registry", "tests", "scripts"):
            if (root / part).is_dir():
                shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root / "pyproject.toml", copy)
        module = copy / file
        progress(0, len(chosen), None)
        ground = baseline(context, copy, module, tests, max(time_limit_s, LEAST_S))
        if ground.trial.status != "passed" or not ground.durations:
            raise SystemExit(
                f"the tests do not pass as they are ({ground.trial.status}):\n{ground.trial.output[-3000:]}"
            )
        for stale_code in (module.parent / "__pycache__").glob(f"{module.stem}.*.pyc"):
            stale_code.unlink()
        killers: list[str] = []
        for mutant in chosen:
            if time.monotonic() >= deadline:
                break
            module.write_text(mutant.text)
            verdict = _try(context, copy, mutant, ground, killers, module.stem)
            module.write_text(source)
            if verdict.test:
                killers = [verdict.test, *(one for one in killers if one != verdict.test)]
            verdicts.append(verdict)
            progress(len(verdicts), len(chosen), verdict)
    return Report(file, seed, verdicts, len(chosen), len(same), stale)


def _try(
    context: Any, copy: Path, mutant: Mutant, ground: Baseline, killers: list[str], stem: str
) -> Verdict:
    """Run the tests that run the changed lines, those first that found something before."""
    tests = ground.tests_for(mutant.line, mutant.end)
    if not tests:
        return Verdict(mutant, "survived", "")
    order = [one for one in killers if one in tests] + [one for one in tests if one not in killers]
    likely = next((one for one in order if f"test_{stem}" in one), order[0]).split("::")[0]
    # The likeliest file alone, then the others: most changes end there, and importing the others takes its time.
    for part in (
        [one for one in order if one.split("::")[0] == likely],
        [one for one in order if one.split("::")[0] != likely],
    ):
        if part:
            usual_s = sum(ground.durations[one] for one in part)
            done: Trial = trial(context, copy, part, LEAST_S + PATIENCE * usual_s)
            if done.status != "passed":
                return Verdict(mutant, done.status, done.test)
    return Verdict(mutant, "survived", "")


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 when an entry of the list of equivalent changes matches nothing any more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", help="its path from the root")
    parser.add_argument(
        "--tests", action="append", help="what to run (default: the unit tests of its folder; repeatable)"
    )
    parser.add_argument("--count", type=int, default=35, help="changes to try, at most")
    parser.add_argument(
        "--seed", type=int, default=None, help="draws them (default: a new one, which is told)"
    )
    parser.add_argument("--line", type=int, action="append", help="only changes of this line (repeatable)")
    parser.add_argument(
        "--time-limit", type=float, default=900.0, metavar="SECONDS", help="begin no trial after it"
    )
    parser.add_argument("--json", type=Path, help="write the outcome there")
    parser.add_argument("--equivalent", type=Path, default=EQUIVALENT, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as ^C: clean up first
    root = options.root.resolve()
    file = str((root / options.module).resolve().relative_to(root))
    seed = random.randrange(10**6) if options.seed is None else options.seed
    report = _with_bar(root, file, options.tests or [_tests_of(root, file)], options.count, seed, options)
    _print(report)
    if options.json:
        options.json.write_text(json.dumps(_as_json(report), indent=2) + "\n")
    return 1 if report.stale else 0


def _with_bar(
    root: Path, file: str, tests: list[str], count: int, seed: int, options: argparse.Namespace
) -> Report:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{file}: the tests as they are", total=None)
        survived = 0

        def progress(done: int, total: int, verdict: Verdict | None) -> None:
            nonlocal survived
            if verdict is not None:
                survived += not verdict.killed
                bar.update(task, description=f"{file}: {survived} survived", completed=done, total=total)

        return mutate(
            root, file, tests, count=count, seed=seed, time_limit_s=options.time_limit,
            equivalent=read_equivalent(options.equivalent), progress=progress, lines=options.line,
        )  # fmt: skip


def _tests_of(root: Path, file: str) -> str:
    """The folder of unit tests that mirrors a module's; the nearest one above it that there is."""
    folder = Path("tests/unit", *Path(file).parent.parts[1:])
    while not (root / folder).is_dir():
        folder = folder.parent
    return str(folder)


def _print(report: Report) -> None:
    for verdict in report.verdicts:
        mutant = verdict.mutant
        by = f" by {verdict.test}" if verdict.test else "" if verdict.killed else " (see the diff)"
        print(f"{'killed  ' if verdict.killed else 'SURVIVED'} {report.file}:{mutant.line} {mutant.kind}{by}")
        if not verdict.killed:
            print("    " + mutant.diff.replace("\n", "\n    "))
    for entry in report.stale:
        print(
            f"STALE: no change of {entry.file} is this any more; mend or remove the entry of equivalent.toml:"
        )
        print(f"    - {entry.before}\n    + {entry.after}")
    if len(report.verdicts) < report.tried_of:
        print(
            f"the time was over: {report.tried_of - len(report.verdicts)} of {report.tried_of} were not tried"
        )
    print(
        f"{report.file}: {report.killed} of {len(report.verdicts)} killed, score {report.score:.2f}"
        f" (seed {report.seed}; {report.equivalent} listed as equivalent)"
    )


def _as_json(report: Report) -> dict[str, object]:
    return {
        "file": report.file, "seed": report.seed, "count": len(report.verdicts), "killed": report.killed,
        "score": round(report.score, 3), "not_tried": report.tried_of - len(report.verdicts),
        "equivalent": report.equivalent, "stale": [[one.before, one.after] for one in report.stale],
        "mutants": [
            {"line": one.mutant.line, "kind": one.mutant.kind, "before": one.mutant.before, "after": one.mutant.after,
             "status": one.status, "test": one.test}
            for one in report.verdicts
        ],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
