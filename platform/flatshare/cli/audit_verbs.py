"""Verbs of the audit log: show, verify."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flatshare.cli.context import StoreOption, open_registry
from flatshare.cli.output import AsJson, out, print_json, print_table, when
from flatshare_registry.errors import Corrupt, InvalidInput
from flatshare_registry.ids import TenantId


class ShowByDefault(TyperGroup):
    """`audit acme` is `audit show acme`; a tenant called `verify` is shown by `audit show verify`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See :class:`click.Command`. The context is click's own, or the one of typer's copy of it."""
        if args and args[0] not in self.commands and args[0] not in self.get_help_option_names(ctx):
            args = ["show", *args]
        return super().parse_args(ctx, args)


audit_app = typer.Typer(
    help="Show and check the audit log: who changed what. `audit TENANT` is `audit show TENANT`.",
    no_args_is_help=True,
    cls=ShowByDefault,
)


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.add_typer(audit_app, name="audit", rich_help_panel="Registry")


@audit_app.command("show")
def show(
    tenant: Annotated[str, typer.Argument(metavar="TENANT")],
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Show who changed what for a tenant, oldest first; also for a deleted or erased tenant."""
    entries = open_registry(store).audit(TenantId(tenant))
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in entries])
        return
    print_table(
        "",
        ["revision#", "when", "who", "what", "alias", "from#", "to#", "detail"],
        [
            (
                e.revision,
                when(e.at),
                e.actor,
                e.action.value,
                e.alias or "",
                e.from_version or "",
                e.to_version or "",
                " ".join(f"{name}={value}" for name, value in e.detail.items() if value),
            )
            for e in entries
        ],
    )


@audit_app.command("verify")
def verify(
    tenant: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="Whose log; by default all tenants'.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="With TENANT: a link that you kept; its entry must still be there."),
    ] = None,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Check that no entry was altered, removed or added (exit code 6 if one was), and show the last link.

    A link that is kept elsewhere also detects a log that was rewritten from its beginning.
    """
    if link is not None and tenant is None:
        raise InvalidInput("--link is one tenant's: flatshare audit verify TENANT --link LINK")
    registry = open_registry(store)
    tenants = [TenantId(tenant)] if tenant is not None else registry.all_ids()
    problems: dict[str, list[str]] = {}
    links: dict[str, str] = {}
    entries = 0
    for one in tenants:
        found = registry.verify_audit(one)
        last = registry.last_entry(one)
        entries += last.revision
        links[one] = last.link
        if link is not None and not any(entry.link == link for entry in registry.audit(one)):
            found.append("no entry has the link that you kept: the log was written anew")
        if found:
            problems[one] = found
    if as_json:
        print_json({
            "whole": not problems, "tenants": len(tenants), "entries": entries, "problems": problems,
            "links": links,
        })  # fmt: skip
    else:
        for name, lines in problems.items():
            for line in lines:
                out.print(f"{name}: {line}", soft_wrap=True)
    if problems:
        raise Corrupt(f"the audit log of {', '.join(problems)} is not whole")
    if not as_json:
        out.print(f"whole: {entries} entries of {len(tenants)} tenants")
        if tenant is not None:
            out.print(f"last link {links[tenant]}", soft_wrap=True)
