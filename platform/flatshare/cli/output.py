"""How commands speak: tables for people, ``--json`` for programs, progress bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["AsJson", "err", "out", "print_json", "print_table", "printable", "progress_bar", "size", "when"]

WIDE: Final = 200
"""Columns when stdout is no terminal: a pipe or a log should not get cells folded at 80."""

# No markup: what is shown is often a tenant's own text, and must look as it is.
out = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


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
    """Text that can't move a terminal's cursor, or colour it: what could is shown as Python writes it."""
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
