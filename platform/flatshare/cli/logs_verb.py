"""``flatshare logs``: the lines that the edge wrote of requests, on the machine where it writes them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from flatshare.access_log import log_target
from flatshare.cli.output import AsJson, out, printable, when
from flatshare.settings import load_settings
from flatshare_registry.errors import InvalidInput
from flatshare_registry.ids import TenantId

__all__ = ["add_to"]

LOOK_S: Final = 0.2
READ_BYTES: Final = 1024**2


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command(rich_help_panel="Running platform")(logs)


def logs(
    tenant: Annotated[str | None, typer.Option(help="Only requests for this one's models.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Only statuses from 400 on.")] = False,
    file: Annotated[
        Path | None, typer.Option(help="The log file; by default the one that FLATSHARE_ACCESS_LOG names.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the access log: a line for each request, by the edge of this machine (FLATSHARE_ACCESS_LOG)."""
    wanted = TenantId(tenant) if tenant is not None else None
    try:
        for line in lines_of(file or _own(), follow):
            one = _parsed(line)
            if one is None or (wanted is not None and _tenant(one) != wanted):
                continue
            status = one.get("status")
            if failed and not (isinstance(status, int) and status >= 400):
                continue
            text = line if as_json else _text(one)
            out.print(printable(text), soft_wrap=True)
    except KeyboardInterrupt:
        return


def lines_of(path: Path, follow: bool) -> Iterator[str]:
    """Whole lines of a file; with ``follow`` for ever, also after it was cut or replaced.

    Raises
    ------
    OSError
        It can't be read.
    """
    file = path.open("rb")
    try:
        rest = b""
        while True:
            data = file.read(READ_BYTES)
            if data:
                *whole, rest = (rest + data).split(b"\n")
                yield from (line.decode("utf-8", "backslashreplace") for line in whole if line)
            elif not follow:
                return
            elif _is_other(path, file.fileno(), file.tell()):
                file.close()
                file, rest = path.open("rb"), b""
            else:
                time.sleep(LOOK_S)  # a file that grows tells nobody
    finally:
        file.close()


def _is_other(path: Path, handle: int, at: int) -> bool:
    """Whether a path names another file now, or one that was cut."""
    try:
        now = os.stat(path)
    except FileNotFoundError:
        return False  # it is being replaced
    return not os.path.samestat(now, os.fstat(handle)) or now.st_size < at


def _own() -> Path:
    path = log_target(load_settings().access_log)[1]
    if path is None:
        raise InvalidInput(
            "no access log is written to a file here; start the platform with FLATSHARE_ACCESS_LOG=FILE, "
            "or name one with --file"
        )
    return path


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        one = json.loads(line)
    except ValueError:
        return None
    return one if isinstance(one, dict) else None


def _tenant(one: dict[str, Any]) -> str:
    """Whose model was asked for: an answer names the tenant, a refusal only has what was asked."""
    tenant = str(one.get("tenant", "-"))
    return tenant if tenant != "-" else str(one.get("model", "-")).partition("@")[0].partition(":")[0]


def _text(one: dict[str, Any]) -> str:
    moment = when(float(one["time"])) if isinstance(one.get("time"), (int, float)) else "-"
    exact = one.get("version", "-") != "-"
    model = f"{one.get('tenant')}@{one['version']}" if exact else one.get("model", "-")
    parts = [one.get(name, "-") for name in ("status", "ms", "method", "path")]
    ended = one.get("code", "-") if one.get("code", "-") != "-" else one.get("tier", "-")
    return " ".join(map(str, [moment, *parts, model, ended, one.get("id", "-")]))
