"""Write platform/SETTINGS.md's table from the code: ``.venv/bin/python scripts/settings.py``."""

from __future__ import annotations

from pathlib import Path

from pages import replaced, table
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flatshare.settings import Settings

PAGE = Path(__file__).parents[1] / "platform" / "SETTINGS.md"


def page(text: str) -> str:
    rows = [
        (f"`FLATSHARE_{name.upper()}`", shown(field), (field.description or "").replace("|", "\\|"))
        for name, field in Settings.model_fields.items()
    ]
    return replaced(text, table(("variable", "default", "meaning"), rows))


def shown(field: FieldInfo) -> str:
    """A default, for the table."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    return "" if default in ("", None, PydanticUndefined, {}) else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
