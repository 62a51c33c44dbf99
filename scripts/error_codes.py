"""Write platform/API.md's table of errors from the code: ``.venv/bin/python scripts/error_codes.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from pages import replaced, table

from flatshare.api.error_table import INTERNAL, TABLE

PAGE = Path(__file__).parents[1] / "platform" / "API.md"


def page(text: str) -> str:
    rows = [
        (
            known.status,
            f"`{known.code}`",
            (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " "),
        )
        for kind, known in TABLE.items()
    ]
    last = "Something else went wrong here: the log has it, by the request's id."
    rows.append((INTERNAL.status, f"`{INTERNAL.code}`", last))
    return replaced(text, table(("status", "code", "what happened"), sorted(rows)))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
