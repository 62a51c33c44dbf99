"""How commands speak: tables for people, ``--json`` for programs, progress bars on stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flatshare.errors import LocalError

__all__ = [
    "AsJson",
    "err",
    "need_stdout",
    "out",
    "print_json",
    "print_table",
    "printable",
    "progress_bar",
    "size",
    "take_streams",
    "when",
]

WIDE: Final = 200
"""Columns when stdout is no terminal: a pipe or a log should not get cells folded at 80."""

# No markup: what is shown is often a tenant's own text, and must look as it is.
_on_terminal = sys.stdout is not None and sys.stdout.isatty()
out = Console(highlight=False, markup=False, emoji=False, width=None if _on_terminal else WIDE)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def take_streams() -> None:
    """Keep tenants' text on stdout or stderr from ending the command; call it once, before anything else.

    Characters that their encoding lacks are shown as Python escapes. A closed stream (``>&-``) becomes the
    null device, so that no file that is opened later gets its number, and with it what is printed.
    """
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is not None:
            continue
        while (opened := os.open(os.devnull, os.O_RDWR)) < descriptor:
            pass  # a lower number was closed too
        if opened == descriptor:
            setattr(sys, name, _Closed(io.FileIO(descriptor, "w" if descriptor else "r")))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Closed(io.TextIOWrapper):
    """Stands in for a stream that was already closed when this process started."""


def need_stdout() -> None:
    """Raise if what is going to be made could not be shown.

    Raises
    ------
    LocalError
        Standard output is closed.
    """
    if sys.stdout is None or isinstance(sys.stdout, _Closed):
        raise LocalError("standard output is closed: the key could not be shown, so none is made")


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    json.dump(document, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; columns whose name ends in ``#`` are aligned right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.rstrip("#"), justify="right" if column.endswith("#") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*[printable(str(cell)) for cell in row])
    out.print(table)


def printable(text: str) -> str:
    """Text that can't move a terminal's cursor, or colour it: such characters are shown as Python escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


@contextmanager
def progress_bar(label: str) -> Iterator[Any]:
    """Yields ``update(done, total)``; drawn on stderr, and only where somebody looks."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def size(size_bytes: float) -> str:
    """Bytes for people: ``4.8 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable: the loop returns at GB")


def when(moment: datetime | float) -> str:
    """A time for people, local, to the second."""
    local = datetime.fromtimestamp(moment).astimezone() if isinstance(moment, float) else moment.astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S")
