"""Verbs of tasks: list, show, cancel, replay, and how much waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from flatshare.cli.answers import Task, TaskPage, TaskQueue, parsed
from flatshare.cli.context import StoreOption, UrlOption, call, open_registry, platform_url
from flatshare.cli.output import AsJson, out, print_json, print_table, size
from flatshare.tasks.inputs import TaskInputs
from flatshare_registry.errors import InvalidInput
from flatshare_registry.ids import TenantId

__all__ = ["add_to"]

tasks_app = typer.Typer(no_args_is_help=True, help="Requests that are answered later.")

TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="Its id, as the answer to POST /tasks names it.")
]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.add_typer(tasks_app, name="tasks", rich_help_panel="Running platform")


dead_app = typer.Typer(no_args_is_help=True, help="Tasks that were given up: looked into, replayed, dropped.")
tasks_app.add_typer(dead_app, name="dead")


@dead_app.command("list")
def list_dead(
    tenant: Annotated[str | None, typer.Argument(help="Whose tasks; by default those of the key.")] = None,
    before: Annotated[str, typer.Option(help="Only tasks older than this: a page's `next`.")] = "",
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """A tenant's dead letters, newest first."""
    list_tasks(tenant, "dead", 100, before, url, as_json)


@tasks_app.command("list")
def list_tasks(
    tenant: Annotated[str | None, typer.Argument(help="Whose tasks; by default those of the key.")] = None,
    state: Annotated[str | None, typer.Option(help="queued, running, done, failed, dead, cancelled.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    before: Annotated[str, typer.Option(help="Only tasks older than this: a page's `next`.")] = "",
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """A tenant's tasks, newest first. --state dead: the dead letters."""
    given = {"tenant": tenant, "state": state, "limit": limit, "before": before or None}
    query = {name: str(value) for name, value in given.items() if value is not None}
    page = parsed(call("GET", f"{platform_url(url)}/tasks", params=query), TaskPage)
    if as_json:
        print_json(page)
        return
    print_table(
        "",
        ["task", "state", "model", "path", "attempts#", "created", "error"],
        [
            (
                one["id"], one["state"], one["model"], one["path"], one["attempts"], one["created_at"][:19],
                one.get("error") or "",
            )
            for one in page["tasks"]
        ],
    )  # fmt: skip
    if page["next"]:
        out.print(f"there are more: --before {page['next']}")


@tasks_app.command("upload")
def upload(
    tenant: Annotated[str, typer.Argument(metavar="TENANT")],
    file: Annotated[Path, typer.Argument(help="An array file (.npy), raw octets, or an image.")],
    name: Annotated[str | None, typer.Option(help="What tasks call it; by default the file's name.")] = None,
    store: StoreOption = None,
) -> None:
    """Put an input into the store, for tasks that name it (x-task-input); it stays until its tenant goes."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{file} can't be read: {error.strerror}") from None
    registry = open_registry(store)
    registry.head(TenantId(tenant))  # NotFound: whose would it be?
    chosen = name or file.name
    key = TaskInputs(registry.store).put(TenantId(tenant), chosen, data)
    out.print(f"{size(len(data))} at {key}; a task names it so: x-task-input: {chosen}")


@tasks_app.command("queue")
def queue(url: UrlOption = None, as_json: AsJson = False) -> None:
    """How many tasks wait, and how many consumers run them: for operators."""
    found = parsed(call("GET", f"{platform_url(url)}/admin/tasks"), TaskQueue)
    if as_json:
        print_json(found)
        return
    if not found["answers"]:
        out.print("the queue does not answer; what was taken is in the store, and goes on when it does")
    consumers = found["consumers"] if found["consumers"] is not None else "?"
    print_table(
        "",
        ["due#", "oldest#", "under way#", "consumers#"],
        [
            (
                _number(found["due"]), _number(found["oldest_s"], " s"), _number(found["under_way"]),
                f"{consumers} of {found['min_consumers']} to {found['max_consumers']}",
            )
        ],
    )  # fmt: skip


def _number(value: float | None, unit: str = "") -> str:
    return "?" if value is None else f"{value:.0f}{unit}"


@tasks_app.command("show")
def show(task: TaskArgument, url: UrlOption = None, as_json: AsJson = False) -> None:
    """Show a task: its state, and its answer, or why it has none."""
    _print(call("GET", _address(task, url)), as_json=as_json)


@tasks_app.command("cancel")
def cancel(
    task: TaskArgument,
    drop: Annotated[bool, typer.Option("--drop", help="Also remove it, its input and its answer.")] = False,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a task that has not ended; a run under way ends without effect."""
    query = {"drop": "true"} if drop else {}
    _print(call("DELETE", _address(task, url), params=query), as_json=as_json)


@tasks_app.command("replay")
def replay(task: TaskArgument, url: UrlOption = None, as_json: AsJson = False) -> None:
    """Have a task that is dead or failed tried anew."""
    _print(call("POST", f"{_address(task, url)}/replay"), as_json=as_json)


dead_app.command("show")(show)
dead_app.command("replay")(replay)


@dead_app.command("drop")
def drop_dead(task: TaskArgument, url: UrlOption = None, as_json: AsJson = False) -> None:
    """Remove a dead letter, its input and its answer."""
    cancel(task, True, url, as_json)


def _address(task: str, url: str | None) -> str:
    return f"{platform_url(url)}/tasks/{quote(task, safe='')}"


def _print(reply: Any, *, as_json: bool) -> None:
    found = parsed(reply, Task)
    if as_json:
        print_json(found)
        return
    print_table(
        "", ["field", "value"], [(name, _shown(value)) for name, value in found.items() if value is not None]
    )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
