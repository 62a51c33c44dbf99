"""The words of ``platform/DESIGN.md`` are in the code: each name of its table of words is a class or function there."""

from __future__ import annotations

import ast
import re
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
