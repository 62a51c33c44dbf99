"""`flatshare doctor`: whether this machine is fit for a platform."""

from __future__ import annotations

from dataclasses import asdict

import typer

from flatshare.cli.output import AsJson, err, print_json, print_table
from flatshare.local.doctor import examine

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command(rich_help_panel="This machine")(doctor)


def doctor(as_json: AsJson = False) -> None:
    """Look at versions, settings, the store, ports, limits and keys; say what is wrong, and what to do.

    Exit code 1 when something is wrong. Writes some small objects to the store and removes them, and makes
    the folders of the host tier.
    """
    findings = []
    with err.status("looking ...") as status:
        for finding in examine():
            status.update(f"looking ... {finding.check}")
            findings.append(finding)
    if as_json:
        print_json([asdict(one) for one in findings])
    else:
        print_table(
            "",
            ["check", "", "found", "what to do"],
            [(one.check, one.level, one.found, one.fix) for one in findings],
        )
    if any(one.level == "wrong" for one in findings):
        raise typer.Exit(1)
