"""The words of ``platform/DESIGN.md`` are in the code: each name of its table of words is a class or function there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_word_of_the_glossary_is_in_the_code() -> None:
    table = (ROOT / "platform" / "DESIGN.md").read_text().partition("\n## Words\n")[2]
    table = table.partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.rsplit("|", 2)[1])}
    assert len(rows) > 15, "the table is there"
    defined = {
        node.name
        for source in ("platform", "registry")
        for path in (ROOT / source).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert named <= defined, f"gone from the code: {sorted(named - defined)}"


def test_the_check_finds_a_word_that_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/words.py").write_text((ROOT / "scripts/words.py").read_text())
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform/DESIGN.md").write_text((ROOT / "platform/DESIGN.md").read_text())
    (tmp_path / "platform/a.py").write_text(
        '"""Keeps a Disk Cache."""\n\nlocal_cache = 1  # an identifier is nobody\'s text\n\n'
        'x = "the model name"  # words: ok\n\n# whitelists\n'
    )
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, "scripts/words.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    found = [line.partition(": ")[0] for line in done.stdout.splitlines()[:-1]]
    assert found == ["platform/a.py:1", "platform/a.py:7"], done.stdout
