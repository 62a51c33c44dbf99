"""Write platform/SETTINGS.md's table from the code: ``.venv/bin/python scripts/settings.py``."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from flatshare.settings import Settings

PAGE = Path(__file__).parents[1] / "platform" / "SETTINGS.md"
START, END = "<!-- table -->\n", "<!-- end -->\n"


def table() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        shown = "" if default in ("", None, PydanticUndefined, {}) else f"`{default}`"
        about = (field.description or "").replace("|", "\\|")
        rows.append(f"| `FLATSHARE_{name.upper()}` | {shown} | {about} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
