"""``flatshare``: one command, verbs by task."""

from __future__ import annotations

import sys

import typer

from flatshare.cli import (
    bench_verb,
    fleet,
    platform_verbs,
    registry_verbs,
    tenancy_verbs,
    training_verbs,
)
from flatshare.cli.errors import exit_code
from flatshare.cli.output import err, printable
from flatshare.errors import ServeError
from flatshare_registry.errors import RegistryError

app = typer.Typer(
    name="flatshare",
    help="Many customers, one pool of replicas: register models, serve them by header, "
    "see what is loaded where.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)

platform_verbs.add_to(app)
fleet.add_to(app)
bench_verb.add_to(app)
registry_verbs.add_to(app)
tenancy_verbs.add_to(app, registry_verbs.tenants_app)
training_verbs.add_to(app)


def main() -> None:
    """Entry point: errors of ours become one line and an exit code."""
    try:
        app()
    except (RegistryError, ServeError) as error:
        err.print("error:", style="red", end=" ")
        err.print(printable(error.message), soft_wrap=True)
        sys.exit(exit_code(error))
    except OSError as error:  # a full disk, a closed pipe: whatever this machine refuses us
        reason = error.strerror or str(error)
        sys.stderr.write(f"error: {error.filename}: {reason}\n" if error.filename else f"error: {reason}\n")
        sys.exit(7)


if __name__ == "__main__":
    main()
