"""Write platform/METRICS.md's table from the code: ``.venv/bin/python scripts/metrics.py``."""

from __future__ import annotations

from pathlib import Path

from pages import replaced, table

from flatshare.control.metrics import FAMILIES

PAGE = Path(__file__).parents[1] / "platform" / "METRICS.md"


def page(text: str) -> str:
    rows = [
        (
            f"`{one.name}_total`" if one.kind == "counter" else f"`{one.name}`",
            one.kind,
            ", ".join(f"`{label}`" for label in one.labels),
            one.help,
        )
        for one in FAMILIES
    ]
    return replaced(text, table(("metric", "kind", "labels", "what it is"), rows))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
