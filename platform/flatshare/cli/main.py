"""``flatshare``: one command, verbs by task."""

from __future__ import annotations

import os
import sys
from typing import TypeGuard

import typer

from flatshare.cli import (
    audit_verbs,
    batch_verb,
    bench_verb,
    cluster_verbs,
    doctor_verb,
    fleet,
    logs_verb,
    plan_verb,
    platform_verbs,
    registry_verbs,
    settings_verbs,
    task_verbs,
    tenancy_verbs,
    top_verb,
    training_verbs,
    usage_verb,
)
from flatshare.cli.errors import ABOUT_EXIT_CODES, exit_code
from flatshare.cli.output import err, printable, take_streams
from flatshare.errors import ServeError
from flatshare.settings import unknown_variables
from flatshare_registry.errors import RegistryError

app = typer.Typer(
    name="flatshare",
    help="Many customers, one pool of replicas: register models, serve them by header, "
    "see what is loaded where.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
    epilog=ABOUT_EXIT_CODES,
)


@app.callback()
def before() -> None:
    """Warn of variables that nothing reads: a misspelt setting has no effect."""
    unknown = unknown_variables(os.environ)
    if unknown:
        names = ", ".join(f"{name} (is {near} meant?)" if near else name for name, near in unknown.items())
        err.print("warning:", style="yellow", end=" ")
        err.print(printable(f"there is no setting {names}; it has no effect"), soft_wrap=True)


platform_verbs.add_to(app)
cluster_verbs.add_to(app)
fleet.add_to(app)
settings_verbs.add_to(app)
task_verbs.add_to(app)
bench_verb.add_to(app)
plan_verb.add_to(app)
registry_verbs.add_to(app)
audit_verbs.add_to(app)
tenancy_verbs.add_to(app, registry_verbs.tenants_app)
top_verb.add_to(app)
logs_verb.add_to(app)
usage_verb.add_to(app)
training_verbs.add_to(app)
batch_verb.add_to(app)
doctor_verb.add_to(app)


def main() -> None:
    """Entry point: errors of ours become one line and an exit code."""
    take_streams()
    try:
        app()
    except (RegistryError, ServeError) as error:
        err.print("error:", style="red", end=" ")
        err.print(printable(error.message), soft_wrap=True)
        sys.exit(exit_code(error))
    except OSError as error:  # a full disk, a closed pipe: whatever this machine refuses us
        names = [printable(os.fsdecode(name)) for name in (error.filename, error.filename2) if _is_path(name)]
        sys.stderr.write(": ".join(["error", *names, error.strerror or str(error)]) + "\n")
        sys.exit(7)


def _is_path(name: object) -> TypeGuard[str | bytes]:
    """Whether an error names a file by path, not by number or not at all."""
    return isinstance(name, str | bytes)


if __name__ == "__main__":
    main()
