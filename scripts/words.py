"""Words that are not used here, by the table in platform/DESIGN.md: exits with 1 where one is. Run by scripts/check.

Looks at pages, and at docstrings, comments and texts of the code, whatever their case. Identifiers are not looked
at: some are other people's. A line of code that needs such a word says so with ``words: ok``.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = "platform/DESIGN.md"
MARK = "words: ok"


def not_used() -> dict[str, str]:
    """What to say instead, by the word that is not used."""
    table = (ROOT / PAGE).read_text().partition("\n| not | but |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    return {word.strip(): instead for words, instead in rows for word in words.split(",")}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that people read, by number."""
    content = path.read_text()
    if path.suffix == ".md":
        yield from enumerate(content.splitlines(), 1)
        return
    lines = content.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)):
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                if MARK not in lines[number - 1]:
                    yield number, line


def main() -> int:
    words = not_used()
    assert len(words) > 10, "the table is there"
    # Whole words: what begins like one of them is another.
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})s?\b", re.IGNORECASE)
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "platform/*.py", "registry/*.py", "scripts/*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    found = 0
    # What other contenders of the bench say is theirs.
    for name in (
        one for one in listed if not one.startswith(("scripts/bench/expert", "scripts/bench/stock"))
    ):
        in_table = False
        for number, line in texts(ROOT / name):
            in_table = name == PAGE and (line == "| not | but |" or (in_table and line.startswith("|")))
            for one in pattern.finditer("" if in_table else line):
                found += 1
                print(f"{name}:{number}: not {one[0]!r}: {words[one[1].lower()]}")
    print(f"words: {len(words)} that are not used, in {len(listed)} files: {found or 'none'} found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
