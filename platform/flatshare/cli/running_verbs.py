"""Verbs for what runs on this machine already: down, status. They need neither ray nor torch."""

from __future__ import annotations

import contextlib
import signal
from typing import Annotated, Any, Final

import psutil
import typer

from flatshare.cli.context import call
from flatshare.cli.output import AsJson, err, out, print_json, print_table
from flatshare.errors import Forbidden, LocalError, OverQuota, ServeError, SettingsError, Unauthenticated
from flatshare.local.processes import wait_until_ended
from flatshare.local.state import PlatformState, known_states
from flatshare.settings import load_settings
from flatshare_registry.errors import RegistryError

__all__ = ["STOP_TIMEOUT_S", "PortOption", "down", "status"]

STOP_TIMEOUT_S: Final = 60.0

PortOption = Annotated[int | None, typer.Option(help="Port of the edge.", show_default="8000")]
OwnPortOption = Annotated[
    int | None,
    typer.Option(help="Port of its edge, where several run here.", show_default="the one that runs here"),
]


def down(port: OwnPortOption = None) -> None:
    """End exactly what `up` started, also while it starts."""
    settings = load_settings(port=port)
    named = settings.port if "port" in settings.model_fields_set else None
    known = known_states()
    alive = [state for state in known if state.process() is not None]
    chosen = [state for state in alive if named in (None, state.port)]
    if len(chosen) > 1:
        raise LocalError(f"several platforms run here ({_where(chosen)}); choose one with --port")
    if chosen:
        _end(chosen[0])
        return
    dead = [state for state in known if state not in alive and named in (None, state.port)]
    for state in dead:
        ended = state.end_leftovers()
        out.print(
            f"flatshare on port {state.port} had died; ended what was left: {', '.join(ended) or 'nothing'}"
        )
    if not dead:
        here = "here" if named is None else f"on port {named}"
        others = f"; it does on {_where(alive)}: flatshare down --port" if alive else ""
        out.print(f"flatshare does not run {here}{others}")


def _where(states: list[PlatformState]) -> str:
    return ", ".join(f"port {state.port}" for state in states)


def _end(state: PlatformState) -> None:
    process = state.process()
    if process is None:
        return  # between two looks
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
    with err.status("stopping ..."):
        for one in wait_until_ended([process], STOP_TIMEOUT_S):
            err.print(f"pid {one.pid} did not end in {STOP_TIMEOUT_S:g} s; killing it", style="yellow")
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    for one in wait_until_ended(family, 10):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    state.remove()
    out.print(f"flatshare on port {state.port} is down")


def status(port: OwnPortOption = None, as_json: AsJson = False) -> None:
    """What runs on this machine, and whether it answers. Exit code 3 when nothing does."""
    load_settings(port=port)  # reports a wrong setting as such, not as a platform that does not answer
    states = [state for state in known_states() if port in (None, state.port) and state.process() is not None]
    rows = [_row(state) for state in states]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(
            "",
            ["url", "pid#", "edge", "answers", "replicas#", "models#", "store"],
            [
                (
                    row["url"],
                    row["pid"],
                    row["edge"],
                    "yes" if row["answers"] else "starting" if row["phase"] == "starting" else "no",
                    f"{_count(row['replicas']['running'])}/{row['replicas']['wanted']}",
                    _count(row["models"]),
                    row["store"],
                )
                for row in rows
            ],
        )
        for row in rows:
            if row["problem"]:
                err.print(f"{row['url']}: {row['problem']}", style="yellow", soft_wrap=True)
    else:
        out.print("flatshare does not run here; start it with: flatshare up")
    if not any(row["answers"] for row in rows):
        raise typer.Exit(3)


def _row(state: PlatformState) -> dict[str, Any]:
    """One platform, as ``--json`` shows it; counts are null where it does not tell us."""
    row: dict[str, Any] = {
        "url": state.url,
        "pid": state.pid,
        "edge": state.edge,
        "store": state.store,
        "phase": state.phase,
        "answers": False,
        "problem": None,
        "replicas": {"running": 0, "wanted": state.replicas},
        "models": 0,
    }
    if state.phase == "starting":
        return row
    try:
        fleet = call("GET", f"{state.url}/admin/replicas").json()
        running = sum(one["state"] == "RUNNING" for one in fleet["replicas"])
        models = sum(len(one["models"]) for one in fleet["replicas"])
    except SettingsError:
        raise
    except (Unauthenticated, Forbidden, OverQuota) as error:  # it answers, if not us
        running = models = None
        row |= {"answers": True, "problem": error.message}
    except (ServeError, RegistryError) as error:
        row["problem"] = error.message
        return row
    except (ValueError, KeyError, TypeError):
        row["problem"] = "what answers there is not flatshare"
        return row
    return row | {
        "answers": True,
        "models": models,
        "replicas": {"running": running, "wanted": state.replicas},
    }


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)
