"""``flatshare top``: the fleet, live in a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Final

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flatshare.cli.answers import Fleet, History, parsed
from flatshare.cli.context import UrlOption, call, platform_url
from flatshare.cli.output import AsJson, out, print_json, printable, size
from flatshare_registry.errors import Unavailable

__all__ = ["add_to"]

LEVELS: Final = " ▁▂▃▄▅▆▇█"
SPARKS: Final = 60
"""Points of a line: a quarter of an hour."""

MODELS: Final = 15
"""Models that are shown, the most used first."""


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command(rich_help_panel="Running platform")(top)


def top(
    every: Annotated[float, typer.Option(min=0.5, max=3600, help="Seconds between looks.")] = 2.0,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Show the fleet live: replicas, hit rate, time of a request, busiest tenants, most used models.

    It runs until Ctrl-C. Without a terminal (a pipe, --json) it shows the fleet once.
    """
    base = platform_url(url)
    fleet, history = look(base)
    if as_json:
        print_json({"fleet": fleet, "history": history})
        return
    if not out.is_terminal:
        out.print(frame(fleet, history))
        return
    note = ""
    with Live(frame(fleet, history), console=out, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)  # a terminal is looked at: there is no event to await
                try:
                    fleet, history = look(base)
                    note = ""
                except Unavailable as error:  # what was seen last stays
                    note = error.message
                live.update(frame(fleet, history, note), refresh=True)
        except KeyboardInterrupt:
            return


def look(base: str) -> tuple[Fleet, History]:
    """The fleet now, and its last hour."""
    fleet = parsed(call("GET", f"{base}/admin/replicas"), Fleet)
    return fleet, parsed(call("GET", f"{base}/admin/history"), History)


def frame(fleet: Fleet, history: History, note: str = "") -> Group:
    """One look, as it is drawn."""
    points = history["points"][-SPARKS:]
    last = points[-1] if points else None
    lines = Table.grid(padding=(0, 2))
    for name, values, text in (
        (
            "requests/s",
            [one["requests_per_s"] for one in points],
            f"{last['requests_per_s']:.1f}" if last else "-",
        ),
        ("on the device", [one["device"] for one in points], _percent(last["device"] if last else None)),
        ("p50", [one["p50"] for one in points], _ms(last["p50"] if last else None)),
        ("p99", [one["p99"] for one in points], _ms(last["p99"] if last else None)),
    ):
        lines.add_row(name, text, Text(spark(values), style="cyan"))
    replicas = _table(
        "replica", "place#", "node", "device", "state", "slots#", "ongoing#", "queued#", "bytes#"
    )
    for one in fleet["replicas"]:
        _add(
            replicas, one["replica"], one["place"], one["node"], one["device"], one["state"],
            f"{one['slots_used']}/{one['slots']}", one["ongoing"], one["queued"], size(one["held_bytes"]),
        )  # fmt: skip
    for pending in fleet["not_answering"]:
        _add(replicas, pending["replica"], "", pending["node_ip"], "", pending["state"], "", "", "", "")
    tenants = _table("busiest tenant", "requests/s#")
    for busy in history["tenants"]:
        _add(tenants, busy["tenant"], f"{busy['requests_per_s']:.1f}")
    models = _table("most used model", "replica", "from", "hits#", "leases#", "held")
    found = [(model["hits"], one["replica"], model) for one in fleet["replicas"] for model in one["models"]]
    for hits, replica, model in sorted(found, key=lambda each: -each[0])[:MODELS]:
        held = "pinned" if model["pinned"] else model["state"]
        _add(
            models,
            f"{model['tenant']}@{model['version']}",
            replica,
            model["tier"],
            hits,
            model["leases"],
            held,
        )
    moment = f"flatshare top, {time.strftime('%H:%M:%S')}"
    return Group(
        Text(f"{moment}: {printable(note)}" if note else moment, style="bold red" if note else "bold"),
        lines, Text(), replicas, Text(), tenants, Text(), models,
    )  # fmt: skip


def spark(values: Sequence[float | None]) -> str:
    """A sparkline: the highest value is a full block, and an unknown value is a gap."""
    highest = max((value for value in values if value is not None), default=0.0) or 1.0
    steps = len(LEVELS) - 1
    return "".join(
        " " if value is None else LEVELS[max(round(value / highest * steps), 1)] for value in values
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.rstrip("#"), justify="right" if column.endswith("#") else "left")
    return table


def _add(table: Table, *cells: object) -> None:
    table.add_row(*[Text(printable(str(cell))) for cell in cells])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
