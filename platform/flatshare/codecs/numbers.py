"""Numbers that come as text from outside."""

from __future__ import annotations

__all__ = ["whole_number"]


def whole_number(text: str, most: int) -> int | None:
    """The number in a text of plain digits, leading zeros allowed; None for other text, or above ``most``.

    For text from outside: ``int`` also takes signs, spaces, underscores and other scripts' digits, and fails
    on more than 4,300 digits.
    """
    if not text.isascii() or not text.isdigit():
        return None
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(most)):
        return None
    number = int(digits)
    return number if number <= most else None
