"""HAProxy's map of models that have copies, or a home of their own: which server such a request goes to.

Pure. A model that was moved has one row, which names its server. A model with copies has a row under its own
name, which says that there are more, and ``COPY_ROWS`` rows ``model/number`` that name servers in turn:
HAProxy draws the number at random. The map is replaced as a whole and at once (``prepare map``, ``add map
@version``, ``commit map``; HAProxy 2.8 ``management.txt``, 9.3), so that no request sees half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from flatshare.edge.servers import server_name

__all__ = ["COPIES_MAP", "COPY_ROWS", "Copies", "map_text", "parse_map", "replace_map", "rows"]

COPIES_MAP: Final = "copies.map"
"""The map's name, and its file beside the configuration. HAProxy runs in that folder, because a converter
can't take a path with a comma or a bracket."""

COPY_ROWS: Final = 60
"""Rows of one model. With 1 to 6, 10, 12 or 15 copies each copy has the same number of rows; with any other
number of copies their shares differ by one row.
"""

LINES_A_COMMAND: Final = 100
"""Lines of the map in one command: HAProxy reads a command into one buffer."""

Copies = Mapping[str, Sequence[int]]
"""Places by model ref, for models that the ring's home alone does not serve."""


def rows(copies: Copies) -> dict[str, str]:
    """The map's keys and values."""
    found: dict[str, str] = {}
    for model_ref in sorted(copies):
        places = copies[model_ref]
        if len(places) == 1:
            found[model_ref] = server_name(places[0])
        elif places:
            found[model_ref] = str(len(places))
            for number in range(COPY_ROWS):
                found[f"{model_ref}/{number}"] = server_name(places[number % len(places)])
    return found


def map_text(wanted: Mapping[str, str]) -> str:
    """The map as a file, for an HAProxy that starts."""
    return "".join(f"{key} {value}\n" for key, value in wanted.items())


def parse_map(answer: str) -> dict[str, str]:
    """What ``show map FILE`` says: a reference, a key and a value a line."""
    found = {}
    for line in answer.splitlines():
        parts = line.split(" ", 2)
        if len(parts) == 3 and parts[0].startswith("0x"):
            found[parts[1]] = parts[2]
    return found


def replace_map(version: int, wanted: Mapping[str, str]) -> list[str]:
    """Commands that put ``wanted`` in the place of all that is in the map.

    Parameters
    ----------
    version
        What ``prepare map`` answered.
    """
    lines = [f"{key} {value}" for key, value in wanted.items()]
    chunks = [lines[start : start + LINES_A_COMMAND] for start in range(0, len(lines), LINES_A_COMMAND)]
    return [
        # Many rows in one payload, ended by an empty line: one command a row would be one connection a row.
        *(f"add map @{version} {COPIES_MAP} <<\n" + "\n".join(chunk) + "\n" for chunk in chunks),
        f"commit map @{version} {COPIES_MAP}",
    ]
