"""Pages with a table that is made from the code: between two marks, and nothing else of the page is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

START, END = "<!-- table -->\n", "<!-- end -->\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (columns, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    return "\n".join(lines) + "\n"


def replaced(text: str, made: str) -> str:
    """A page's text with this table."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{made}{END}{after}"
