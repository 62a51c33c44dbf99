"""Verbs for settings that change while the platform runs: settings show, settings set."""

from __future__ import annotations

import json
from typing import Annotated, Any

import httpx
import typer

from flatshare.cli.answers import LiveSettings, parsed
from flatshare.cli.context import UrlOption, call, platform_url
from flatshare.cli.output import AsJson, err, out, print_json, print_table
from flatshare_registry.errors import InvalidInput

__all__ = ["add_to", "named_values"]

settings_app = typer.Typer(no_args_is_help=True, help="Settings that change without a restart.")


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.add_typer(settings_app, name="settings", rich_help_panel="Running platform")


@settings_app.command("show")
def show(url: UrlOption = None, as_json: AsJson = False) -> None:
    """Show the settings that can change in place, and their values now."""
    _print(call("GET", _address(url)), as_json=as_json)


@settings_app.command("set")
def change(
    values: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="As in the environment: plans as JSON.")
    ],
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Change settings in the control plane and in every replica, until the platform ends. No restart."""
    body = {"settings": named_values(values, as_json=True)}
    reply = call("PATCH", _address(url), json=body)
    found = parsed(reply, LiveSettings)
    _print(reply, as_json=as_json)
    if found["missed"] is None or found["missed"]:
        who = ", ".join(found["missed"] or ()) or "nobody can say which replicas"
        err.print(f"not told yet: {who}; each takes it over within seconds", style="yellow", soft_wrap=True)


def named_values(texts: list[str], *, as_json: bool = False) -> dict[str, Any]:
    """``NAME=VALUE`` by name; ``FLATSHARE_NAME`` is the same name.

    Parameters
    ----------
    as_json
        Values that are valid JSON are parsed as JSON.

    Raises
    ------
    InvalidInput
        One is not of this form.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"{text[:80]!a} is not NAME=VALUE")
        found[name.strip().lower().removeprefix("flatshare_")] = (
            _value(value.strip()) if as_json else value.strip()
        )
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _address(url: str | None) -> str:
    return f"{platform_url(url)}/admin/settings"


def _print(reply: httpx.Response, *, as_json: bool) -> None:
    found = parsed(reply, LiveSettings)
    if as_json:
        print_json(found)
        return
    print_table(
        "", ["setting", "value"], [(name, json.dumps(value)) for name, value in found["settings"].items()]
    )
    out.print(f"changed {found['revision']} times since the platform started")
