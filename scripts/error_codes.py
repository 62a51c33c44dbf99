"""Write platform/API.md's table of errors from the code: ``.venv/bin/python scripts/error_codes.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from flatshare.api.error_table import INTERNAL, TABLE

PAGE = Path(__file__).parents[1] / "platform" / "API.md"
START, END = "<!-- table -->\n", "<!-- end -->\n"


def table() -> str:
    rows = [
        (known.status, known.code, (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " "))
        for kind, known in TABLE.items()
    ]
    rows.append(
        (
            INTERNAL.status,
            INTERNAL.code,
            "Something else went wrong here: the log has it, by the request's id.",
        )
    )
    lines = [f"| {status} | `{code}` | {about} |" for status, code, about in sorted(rows)]
    return "\n".join(["| status | code | what happened |", "|---|---|---|", *lines]) + "\n"


def page(text: str) -> str:
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
