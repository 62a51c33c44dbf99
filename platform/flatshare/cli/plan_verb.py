"""``flatshare plan``: how many slots and replicas a hit rate needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from flatshare.cli.context import need_serve_extra
from flatshare.cli.output import AsJson, out, print_json, print_table, progress_bar
from flatshare_registry.errors import InvalidInput

__all__ = ["add_to"]

PLOT_SUFFIXES: Final = (".png", ".svg", ".pdf")


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command(rich_help_panel="Running platform")(plan)


def plan(
    trace: Annotated[
        Path | None,
        typer.Option(help="Requests as CSV with the columns time and tenant, as bench --record writes it."),
    ] = None,
    zipf: Annotated[
        float, typer.Option(min=0, help="Without a trace: exponent of popularity; 0 is all alike.")
    ] = 1.0,
    tenants: Annotated[int, typer.Option(min=1, max=1_000_000, help="Without a trace.")] = 1000,
    requests: Annotated[int, typer.Option(min=100, max=10_000_000, help="Without a trace.")] = 200_000,
    slots: Annotated[int, typer.Option(min=1, max=100_000, help="Models that one replica keeps.")] = 10,
    target: Annotated[
        float | None, typer.Option(min=0, max=1, help="The device hit rate that is wanted.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Hit rate against slots, for LRU and SIEVE, beside one LRU of all slots and Belady's bound.

    Simulated with the platform's own homes, moves and policies; nothing runs, and no platform is asked.
    """
    from flatshare.simulation.plan import plan_for, plot_plan, slots_needed
    from flatshare.simulation.trace import read_trace, zipf_trace

    if plot is not None and (plot.suffix not in PLOT_SUFFIXES or not plot.parent.is_dir()):
        raise InvalidInput(f"--plot {plot}: name a {', '.join(PLOT_SUFFIXES)} file in a folder that exists")
    if plot is not None:
        need_serve_extra()  # it includes matplotlib
    asked = read_trace(trace) if trace is not None else zipf_trace(tenants, zipf, requests, rate=1000.0)
    about = f"{trace.name}: " if trace is not None else f"Zipf({zipf:g}), "
    about += f"{len(asked.names)} tenants, {len(asked)} requests, {slots} slots a replica"
    with progress_bar("fleet sizes") as progress:
        rows = plan_for(asked, slots, progress)
    needed = None
    if target is not None:
        needed = {policy: slots_needed(rows, target, policy) for policy in ("lru", "sieve")}
    if plot is not None:
        plot_plan(rows, plot, about, target)
    if as_json:
        print_json({"about": about, "rows": [asdict(row) for row in rows], "slots_needed": needed})
        return
    print_table(
        about,
        ["replicas#", "slots#", "fleet, LRU#", "fleet, SIEVE#", "one LRU#", "Belady#"],
        [
            (
                row.replicas,
                row.slots,
                *(f"{one:.3f}" for one in (row.lru, row.sieve, row.one_lru, row.belady)),
            )
            for row in rows
        ],
    )
    for policy, count in (needed or {}).items():
        if count is None:
            out.print(f"{policy}: no fleet reaches {target:g}; first requests of a model always miss")
        else:
            out.print(f"{policy}: {target:g} needs {count} slots, {-(-count // slots)} replicas of {slots}")
    if plot is not None:
        out.print(f"drawn: {plot}", soft_wrap=True)
