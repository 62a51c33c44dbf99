"""Verbs of the registry: tenants, register, versions, promote, rollback, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatshare.cli.context import (
    StoreOption,
    UrlOption,
    open_registry,
    probe_of,
    registry_for_change,
    tell_replicas,
)
from flatshare.cli.output import AsJson, out, print_json, print_table, size, when
from flatshare.cli.usage_verb import SinceOption, print_comparison
from flatshare.models.architecture import architecture
from flatshare_registry.errors import InvalidInput
from flatshare_registry.gc import DEFAULT_GRACE_S, collect
from flatshare_registry.ids import PRODUCTION, AliasName, ModelRef, TenantId, parse_version
from flatshare_registry.records import TenantHead, VersionRecord
from flatshare_registry.weights import read_weights

tenants_app = typer.Typer(help="Create, list, show and delete tenants.", no_args_is_help=True)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
AliasOption = Annotated[str, typer.Option("--alias", help="Which alias to move.")]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.add_typer(tenants_app, name="tenants", rich_help_panel="Registry")
    for function in (register, versions, delete_version, promote, rollback, remove_alias, gc):
        app.command(rich_help_panel="Registry")(function)


@tenants_app.command("create")
def create_tenant(tenant: TenantArgument, store: StoreOption = None, url: UrlOption = None) -> None:
    """Create a tenant."""
    registry = registry_for_change(store, url)
    head = registry.create_tenant(TenantId(tenant))
    out.print(f"created tenant {head.tenant}; register its model: flatshare register {head.tenant} FILE")
    tell_replicas(registry, head.tenant, url).check()


@tenants_app.command("list")
def list_tenants(store: StoreOption = None, as_json: AsJson = False) -> None:
    """List all tenants."""
    heads = open_registry(store).list_tenants()
    if as_json:
        print_json([_tenant_document(head) for head in heads])
        return
    print_table(
        "",
        ["tenant", "state", "production#", "versions#", "aliases", "created"],
        [
            (
                head.tenant,
                head.state.value,
                head.aliases.get("production", "-"),
                len(head.versions),
                _aliases(head),
                when(head.created_at),
            )
            for head in heads
        ],
    )


@tenants_app.command("show")
def show_tenant(tenant: TenantArgument, store: StoreOption = None, as_json: AsJson = False) -> None:
    """Show one tenant."""
    head = open_registry(store).head(TenantId(tenant))
    if as_json:
        print_json(_tenant_document(head))
        return
    print_table(
        "",
        ["tenant", head.tenant],
        [
            ("created", when(head.created_at)),
            ("state", head.state.value),
            ("plan", head.plan),
            ("keys", str(len(head.keys))),
            ("aliases", _aliases(head) or "-"),
            ("versions", ", ".join(str(number) for number in sorted(head.versions)) or "-"),
        ],
    )


@tenants_app.command("delete")
def delete_tenant(
    tenant: TenantArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StoreOption = None,
    url: UrlOption = None,
) -> None:
    """Delete a tenant with its versions and aliases; its weights go with the next gc."""
    if not yes:
        typer.confirm(f"Delete tenant {tenant} and all its versions?", abort=True)
    registry = registry_for_change(store, url)
    registry.delete_tenant(TenantId(tenant))
    told = tell_replicas(registry, TenantId(tenant), url)
    out.print(f"deleted tenant {tenant}; {told}", soft_wrap=True)
    told.check()


def register(
    tenant: TenantArgument,
    file: Annotated[Path, typer.Argument(help="A safetensors file.", metavar="FILE")],
    architecture_name: Annotated[str, typer.Option("--architecture", "-a")] = "mnist-cnn",
    alias: Annotated[str | None, typer.Option(help="Also point this alias at it.")] = None,
    note: Annotated[list[str] | None, typer.Option(help="KEY=VALUE to keep with it; repeatable.")] = None,
    create: Annotated[bool, typer.Option("--create", help="Create the tenant if it is missing.")] = False,
    store: StoreOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Register weights as a tenant's next version. Equal weights are registered once.

    The first version of a tenant becomes production; later ones wait for `flatshare promote`.
    """
    parsed = TenantId(tenant)
    network = architecture(architecture_name)
    notes = dict(_note(text) for text in note or [])
    also = AliasName(alias) if alias else None
    data = read_weights(file)
    registry = registry_for_change(store, url)
    done = registry.register(
        parsed,
        data,
        network.name,
        network.tensors,
        alias=also,
        metadata=notes,
        probe=probe_of(network),
        create=create,
    )
    told = tell_replicas(registry, parsed, url)
    if as_json:
        print_json({**_version_document(done.version), "created": done.created})
    else:
        verb = "registered" if done.created else "already registered as"
        about = f"{network.name}, {size(done.version.size_bytes)}"
        out.print(f"{verb} {done.version.name} ({about}); {told}", soft_wrap=True)
    told.check()


def versions(
    tenant: TenantArgument,
    compare: Annotated[
        bool, typer.Option("--compare", help="How they did: requests, failures, time, answers by class.")
    ] = False,
    since: SinceOption = "24h",
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """List a tenant's versions; with --compare, show how the versions used since then performed."""
    registry = open_registry(store)
    if compare:
        print_comparison(registry, TenantId(tenant), since, as_json)
        return
    head = registry.head(TenantId(tenant))
    records = registry.list_versions(TenantId(tenant))
    names = {number: sorted(a for a, n in head.aliases.items() if n == number) for number in head.versions}
    if as_json:
        print_json([{**_version_document(one), "aliases": names.get(one.version, [])} for one in records])
        return
    print_table(
        "",
        ["version", "aliases", "architecture", "size#", "digest", "created", "by", "notes"],
        [
            (
                one.name,
                ", ".join(names.get(one.version, [])),
                one.architecture,
                size(one.size_bytes),
                one.digest[:12],
                when(one.created_at),
                one.created_by,
                " ".join(f"{key}={value}" for key, value in one.metadata.items()),
            )
            for one in records
        ],
    )


def delete_version(
    ref: Annotated[str, typer.Argument(metavar="TENANT@VERSION")],
    store: StoreOption = None,
    url: UrlOption = None,
) -> None:
    """Delete a version that no alias names."""
    tenant, number = _exact(ref)
    registry = registry_for_change(store, url)
    registry.delete_version(tenant, number)
    told = tell_replicas(registry, tenant, url)
    out.print(f"deleted {tenant}@{number}; {told}", soft_wrap=True)
    told.check()


def promote(
    ref: Annotated[str, typer.Argument(metavar="TENANT@VERSION")],
    alias: AliasOption = PRODUCTION,
    store: StoreOption = None,
    url: UrlOption = None,
) -> None:
    """Point an alias (production) at a version."""
    tenant, number = _exact(ref)
    registry = registry_for_change(store, url)
    registry.set_alias(tenant, AliasName(alias), number)
    told = tell_replicas(registry, tenant, url)
    out.print(f"{tenant}:{alias} is now version {number}; {told}", soft_wrap=True)
    told.check()


def rollback(
    tenant: TenantArgument, alias: AliasOption = PRODUCTION, store: StoreOption = None, url: UrlOption = None
) -> None:
    """Point an alias back at what it named before its last move."""
    registry = registry_for_change(store, url)
    head = registry.rollback(TenantId(tenant), AliasName(alias))
    told = tell_replicas(registry, head.tenant, url)
    out.print(f"{tenant}:{alias} is version {head.aliases[alias]} again; {told}", soft_wrap=True)
    told.check()


def remove_alias(
    tenant: TenantArgument,
    alias: Annotated[str, typer.Argument()],
    store: StoreOption = None,
    url: UrlOption = None,
) -> None:
    """Remove an alias."""
    registry = registry_for_change(store, url)
    registry.remove_alias(TenantId(tenant), AliasName(alias))
    told = tell_replicas(registry, TenantId(tenant), url)
    out.print(f"removed {tenant}:{alias}; {told}", soft_wrap=True)
    told.check()


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Really delete; else only list.")] = False,
    grace_hours: Annotated[float, typer.Option(help="Keep younger objects.")] = DEFAULT_GRACE_S / 3600,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Remove weights that no version names, old announcements and counts (a dry run unless --delete)."""
    report = collect(open_registry(store).store, grace_s=grace_hours * 3600, remove=delete)
    if as_json:
        print_json(
            {
                "removed": report.removed,
                "garbage": [{"key": one.key, "size_bytes": one.size_bytes} for one in report.garbage],
                "size_bytes": report.size_bytes,
                "spared": report.spared,
                "live_blobs": report.live_blobs,
                "announcements": report.announcements,
                "usage": report.usage,
            }
        )
        return
    for one in report.garbage:
        out.print(f"{one.key}  {size(one.size_bytes)}", soft_wrap=True)
    verb = "deleted" if report.removed else "would delete (use --delete)"
    out.print(
        f"{verb}: {len(report.garbage)} objects, {size(report.size_bytes)}; "
        f"too young: {report.spared}; in use: {report.live_blobs} blobs; "
        f"old announcements of changes: {report.announcements}; old counts of usage: {report.usage}"
    )


def _exact(text: str) -> tuple[TenantId, int]:
    """Tenant and number of a ref that names a version."""
    ref = ModelRef.parse(text)
    if not isinstance(ref.selector, int):
        raise InvalidInput(f"name a version: {ref.tenant}@7, not {text}")
    return ref.tenant, parse_version(ref.selector)


def _note(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidInput(f"--note takes KEY=VALUE, not {text[:80]!a}")
    return key, value


def _aliases(head: TenantHead) -> str:
    return ", ".join(f"{name}={number}" for name, number in sorted(head.aliases.items()))


def _tenant_document(head: TenantHead) -> dict[str, object]:
    return {
        "id": head.tenant,
        "production": head.aliases.get("production"),
        "state": head.state.value,
        "plan": head.plan,
        "aliases": head.aliases,
        "versions": sorted(head.versions),
        "created_at": head.created_at.isoformat(),
    }


def _version_document(record: VersionRecord) -> dict[str, object]:
    return {**record.model_dump(mode="json", exclude={"schema_version", "tensors"}), "ref": record.name}
