"""Write platform/METRICS.md's table from the code: ``.venv/bin/python scripts/metrics.py``."""

from __future__ import annotations

from pathlib import Path

from flatshare.control.metrics import FAMILIES

PAGE = Path(__file__).parents[1] / "platform" / "METRICS.md"
START, END = "<!-- table -->\n", "<!-- end -->\n"


def table() -> str:
    rows = ["| metric | kind | labels | what it is |", "|---|---|---|---|"]
    for one in FAMILIES:
        name = f"{one.name}_total" if one.kind == "counter" else one.name
        labels = ", ".join(f"`{label}`" for label in one.labels)
        rows.append(f"| `{name}` | {one.kind} | {labels} | {one.help} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
