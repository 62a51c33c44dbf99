"""Verbs of quotas: show, set."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from pydantic import ValidationError

from flatshare.cli.answers import Plans, QuotasShown, parsed
from flatshare.cli.context import (
    StoreOption,
    UrlOption,
    call,
    platform_url,
    registry_for_change,
    tell_replicas,
)
from flatshare.cli.output import AsJson, out, print_json, print_table
from flatshare.errors import ServeError
from flatshare.settings import load_settings
from flatshare_registry.errors import InvalidInput, RegistryError
from flatshare_registry.ids import TenantId
from flatshare_registry.records import DEFAULT_PLAN, Quotas

quotas_app = typer.Typer(help="Show and set what a tenant may use.", no_args_is_help=True)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]


@quotas_app.command("show")
def show_quotas(tenant: TenantArgument, url: UrlOption = None, as_json: AsJson = False) -> None:
    """Show a tenant's plan, its differences from the plan, and what holds (asks the running platform)."""
    route = f"{platform_url(url)}/admin/tenants/{TenantId(tenant)}/quotas"
    found = parsed(call("GET", route), QuotasShown)
    own, effective = found["own"], found["effective"]
    if as_json:
        print_json({"plan": found["plan"], "own": own, "effective": effective})
        return
    print_table(
        f"{tenant}, plan {found['plan']}",
        ["limit", "own#", "holds#"],
        [
            (
                name,
                *(
                    "-" if (value := limits.get(name)) is None else f"{value:g}"
                    for limits in (own, effective)
                ),
            )
            for name in Quotas.model_fields
        ],
    )


@quotas_app.command("set")
def set_quotas(
    tenant: TenantArgument,
    limits: Annotated[
        list[str] | None,
        typer.Argument(metavar="[LIMIT=VALUE]...", help="requests_per_s=50 ...; LIMIT=- takes it away."),
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Also put the tenant on this plan.")] = None,
    store: StoreOption = None,
    url: UrlOption = None,
) -> None:
    """Change how a tenant's limits differ from its plan; limits that are not named stay as they are."""
    wanted = TenantId(tenant)
    registry = registry_for_change(store, url)
    if plan is not None:
        _known_plan(plan, url)
    head = registry.tenancy.edit_quotas(wanted, lambda quotas: _changed(quotas, limits or []), plan=plan)
    own = head.quotas.model_dump(exclude_none=True)
    shown = ", ".join(f"{name}={value:g}" for name, value in own.items()) or "as the plan says"
    told = tell_replicas(registry, wanted, url)
    out.print(f"{tenant}: plan {head.plan}, {shown}; {told}", soft_wrap=True)
    told.check()


def _known_plan(plan: str, url: str | None) -> None:
    """Raise when there is no such plan: on the platform that runs, else in ``FLATSHARE_PLANS`` here."""
    names = {DEFAULT_PLAN, *load_settings().plans}
    try:
        base = platform_url(url)
        names = {DEFAULT_PLAN, *parsed(call("GET", f"{base}/admin/plans"), Plans)["plans"]}
        where = f"the platform at {base} knows"
    except (RegistryError, ServeError) as error:
        where = (
            f"no platform could be asked ({error.message}), and FLATSHARE_PLANS here names, with the default,"
        )
    if plan not in names:
        raise InvalidInput(f"there is no plan {plan[:80]!a}: {where} {', '.join(sorted(names))}")


def _changed(quotas: Quotas, limits: list[str]) -> Quotas:
    document: dict[str, Any] = quotas.model_dump()
    for text in limits:
        name, equals, value = text.partition("=")
        if name not in Quotas.model_fields or not equals:
            raise InvalidInput(f"{text[:80]!a} is not LIMIT=VALUE; limits: {', '.join(Quotas.model_fields)}")
        document[name] = None if value == "-" else value
    try:
        return Quotas.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"{first['loc'][0]}: {first['msg']}") from None
