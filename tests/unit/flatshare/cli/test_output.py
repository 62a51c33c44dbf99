"""What commands print: tenants' own text looks as it is, whatever is in it."""

from __future__ import annotations

import pytest

from flatshare.cli.output import print_table, printable


def test_a_tenants_text_is_neither_markup_nor_terminal_control(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("[/x]", "[red]danger[/red]"), ("a\x1b[2Jb", ":warning: two\nlines")]
    print_table("", ["label", "note"], rows)
    shown = capsys.readouterr().out
    assert "[/x]" in shown and "[red]danger[/red]" in shown
    assert "a\\x1b[2Jb" in shown and ":warning: two\\nlines" in shown
    assert "\x1b" not in shown


def test_letters_of_all_languages_are_printable() -> None:
    assert printable("Ünïcode 日本") == "Ünïcode 日本"
