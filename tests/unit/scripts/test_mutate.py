"""scripts/mutate: which changes it makes, and that it tells a weak test from a strong one."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[3] / "scripts" / "mutation"


def _loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mutation_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


mutants = _loaded("mutants")

SOURCE = '''"""A limit of 7."""
from __future__ import annotations
import logging
from typing import Final

__all__ = ["Limit"]
logger = logging.getLogger(__name__)
MOST: Final = 5


class Limit:
    """Counts to 3."""

    def __init__(self, most: int = 2) -> None:
        self.most = most

    def check(self, n: int, on: bool = True) -> bool:
        """Whether 4 fits."""
        logger.info("asked for %d", 9)
        assert n >= 0, "never less than 0"
        if not on or n + 1 > self.most:
            raise ValueError(f"{n + 1} is more than {self.most}")
        for _ in [one for one in range(n) if one]:
            self.most -= 1
        return n is not None
'''


def changes(source: str = SOURCE) -> set[tuple[str, str, str]]:
    return {(one.kind, one.before, one.after) for one in mutants.mutants_of(source)}


def test_each_change_is_one_place_of_a_module_that_still_compiles() -> None:
    found = mutants.mutants_of(SOURCE)
    assert len({one.text for one in found}) == len(found) > 15
    for one in found:
        assert ast.dump(ast.parse(one.text)) != ast.dump(ast.parse(SOURCE))
        assert SOURCE.splitlines()[one.line - 1].strip() == one.before
        assert one.diff == f"- {one.before}\n+ {one.after}"


def test_operators_constants_conditions_and_statements_are_changed() -> None:
    line = "if not on or n + 1 > self.most:"
    assert changes() >= {
        ("logic", line, "if (not on and n + 1 > self.most):"),
        ("not", line, "if on or n + 1 > self.most:"),
        ("comparison", line, "if not on or (n + 1 >= self.most):"),
        ("comparison", line, "if not on or (n + 1 <= self.most):"),
        ("arithmetic", line, "if not on or (n - 1) > self.most:"),
        ("constant", line, "if not on or n + 2 > self.most:"),
        ("constant", line, "if not on or n + 0 > self.most:"),
        ("forced", line, "if True:"),
        ("forced", line, "if False:"),
        ("forced", "for _ in [one for one in range(n) if one]:", "for _ in [one for one in range(n) if True]:"),
        ("boolean", "def check(self, n: int, on: bool = True) -> bool:", "def check(self, n: int, on: bool = False) -> bool:"),
        ("constant", "def __init__(self, most: int = 2) -> None:", "def __init__(self, most: int = 3) -> None:"),
        ("dropped", 'raise ValueError(f"{n + 1} is more than {self.most}")', "pass"),
        ("dropped", "self.most = most", "pass"),
        ("dropped", "self.most -= 1", "pass"),
        ("arithmetic", "self.most -= 1", "self.most += 1"),
        ("dropped", "return n is not None", "pass"),
        ("comparison", "return n is not None", "return (n is None)"),
    }  # fmt: skip


def test_words_figures_and_invariants_are_left_alone() -> None:
    changed = {before for _, before, _ in changes()}
    for line in SOURCE.splitlines():
        if any(word in line for word in ('"""', "__all__", "logger", "MOST", "assert", "import")):
            assert line.strip() not in changed


def test_a_statement_of_several_lines_and_text_beyond_ascii_are_replaced_whole() -> None:
    source = 'x = {}\nif x == "é" and (\n    len(x) > 3\n):\n    x.update(\n        a=1,\n    )\n'
    found = {one.text for one in mutants.mutants_of(source)}
    assert 'x = {}\nif x == "é" and (\n    len(x) > 3\n):\n    pass\n' in found
    assert 'x = {}\nif x == "é" and (\n    (len(x) >= 3)\n):\n    x.update(\n        a=1,\n    )\n' in found


def test_listed_changes_are_left_out_and_entries_that_match_nothing_are_told() -> None:
    found = mutants.mutants_of(SOURCE)
    hit = mutants.Equivalent("a.py", "self.most -= 1", "pass", "nobody looks")
    stale = mutants.Equivalent("a.py", "self.most -= 1", "self.most -= 7", "was so once")
    other = mutants.Equivalent("b.py", "x", "y", "another file's")
    tried, same, gone = mutants.sort_out(found, "a.py", [hit, stale, other])
    assert ([one.after for one in same], gone) == (["pass"], [stale])
    assert len(tried) == len(found) - 1


def test_an_entry_needs_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "equivalent.toml"
    assert mutants.read_equivalent(path) == []
    entry = '[[equivalent]]\nfile = "a.py"\nbefore = "x"\nafter = "y"\n'
    for text in (entry, f'{entry}reason = " "\n', f'{entry}reason = "r"\nmore = "m"\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="needs file, before, after and reason"):
            mutants.read_equivalent(path)
    path.write_text(f'{entry}reason = "r"\n')
    assert mutants.read_equivalent(path) == [mutants.Equivalent("a.py", "x", "y", "r")]


MODULE = """def allowed(used: int, most: int) -> bool:
    return used < most
"""
WEAK = """from tiny.limits import allowed


def test_something() -> None:
    assert allowed(0, 5)
    assert not allowed(9, 5)
"""
STRONG = (
    WEAK
    + """

def test_the_limit_itself_is_not_allowed() -> None:
    assert allowed(4, 5)
    assert not allowed(5, 5)
"""
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for folder in ("platform/tiny", "registry", "tests/unit/tiny"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n')
    (root / "platform/tiny/__init__.py").write_text("")
    (root / "platform/tiny/limits.py").write_text(MODULE)
    (root / "tests/unit/tiny/test_limits.py").write_text(WEAK)
    return root


def run(root: Path, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    told = root.parent / "told.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "mutate.py"), "platform/tiny/limits.py", "--root", str(root), "--seed", "1",
         "--equivalent", str(root.parent / "equivalent.toml"), "--json", str(told), *more],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done, json.loads(told.read_text()) if told.exists() else {}


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_weak_test_lets_a_change_live_and_a_strong_one_kills_all(tree: Path) -> None:
    before = files(tree)
    done, told = run(tree)
    assert done.returncode == 0, done.stderr
    assert "SURVIVED platform/tiny/limits.py:2 comparison" in done.stdout
    assert "    - return used < most\n    + return (used <= most)\n" in done.stdout
    survivors = [one["after"] for one in told["mutants"] if one["status"] == "survived"]  # type: ignore[attr-defined]
    assert survivors == ["return (used <= most)"]
    assert told["count"] == told["killed"] + 1 == 3  # type: ignore[operator]
    assert files(tree) == before, "the sources are only read"

    (tree / "tests/unit/tiny/test_limits.py").write_text(STRONG)
    done, told = run(tree)
    assert (done.returncode, told["score"], told["killed"]) == (0, 1.0, 3), done.stderr
    assert "test_the_limit_itself_is_not_allowed" in done.stdout


def test_an_entry_of_the_list_that_is_no_change_any_more_is_reported_loudly(tree: Path) -> None:
    (tree.parent / "equivalent.toml").write_text(
        '[[equivalent]]\nfile = "platform/tiny/limits.py"\nbefore = "return used < most"\n'
        'after = "return (used <= most)"\nreason = "a test of this test"\n'
        '[[equivalent]]\nfile = "platform/tiny/limits.py"\nbefore = "return used < 5"\n'
        'after = "return (used <= 5)"\nreason = "was so once"\n'
    )
    done, told = run(tree)
    assert done.returncode == 1
    assert "STALE" in done.stdout and "return (used <= 5)" in done.stdout
    assert (told["score"], told["equivalent"], told["count"]) == (1.0, 1, 2)


def test_tests_that_fail_as_they_are_are_said_and_nothing_is_tried(tree: Path) -> None:
    (tree / "tests/unit/tiny/test_limits.py").write_text(WEAK.replace("9, 5", "1, 5"))
    done, told = run(tree)
    assert done.returncode != 0 and told == {}
    assert "the tests do not pass as they are" in done.stderr
