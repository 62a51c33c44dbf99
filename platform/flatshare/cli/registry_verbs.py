"""Verbs of the registry: tenants, register, versions, promote, rollback, audit, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatshare.cli.context import (
    StoreOption,
    UrlOption,
    ensure_tenant,
    open_registry,
    probe_of,
    tell_replicas,
)
from flatshare.cli.output import AsJson, out, print_json, print_table, size, when
from flatshare.models.architecture import architecture
from flatshare_registry.errors import Corrupt, InvalidInput
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
    for function in (register, versions, delete_version, promote, rollback, remove_alias, audit, gc):
        app.command(rich_help_panel="Registry")(function)


@tenants_app.command("create")
def create_tenant(tenant: TenantArgument, store: StoreOption = None, url: UrlOption = None) -> None:
    """Create a tenant."""
    head = open_registry(store).create_tenant(TenantId(tenant))
    tell_replicas(head.tenant, url)
    out.print(f"created tenant {head.tenant}; register its model: flatshare register {head.tenant} FILE")


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
    open_registry(store).delete_tenant(TenantId(tenant))
    out.print(f"deleted tenant {tenant}; {tell_replicas(TenantId(tenant), url)}")


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
    data = read_weights(file)
    registry = open_registry(store)
    if create:
        ensure_tenant(registry, parsed)
    done = registry.register(
        parsed,
        data,
        network.name,
        network.tensors,
        alias=AliasName(alias) if alias else None,
        metadata=notes,
        probe=probe_of(network),
    )
    told = tell_replicas(parsed, url)
    if as_json:
        print_json({**_version_document(done.version), "created": done.created})
        return
    verb = "registered" if done.created else "already registered as"
    out.print(f"{verb} {done.version.name} ({network.name}, {size(done.version.size_bytes)}); {told}")


def versions(tenant: TenantArgument, store: StoreOption = None, as_json: AsJson = False) -> None:
    """List a tenant's versions."""
    registry = open_registry(store)
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
    open_registry(store).delete_version(tenant, number)
    out.print(f"deleted {tenant}@{number}; {tell_replicas(tenant, url)}")


def promote(
    ref: Annotated[str, typer.Argument(metavar="TENANT@VERSION")],
    alias: AliasOption = PRODUCTION,
    store: StoreOption = None,
    url: UrlOption = None,
) -> None:
    """Point an alias (production) at a version."""
    tenant, number = _exact(ref)
    open_registry(store).set_alias(tenant, AliasName(alias), number)
    out.print(f"{tenant}:{alias} is now version {number}; {tell_replicas(tenant, url)}")


def rollback(
    tenant: TenantArgument, alias: AliasOption = PRODUCTION, store: StoreOption = None, url: UrlOption = None
) -> None:
    """Point an alias back at what it named before its last move."""
    head = open_registry(store).rollback(TenantId(tenant), AliasName(alias))
    out.print(f"{tenant}:{alias} is version {head.aliases[alias]} again; {tell_replicas(head.tenant, url)}")


def remove_alias(
    tenant: TenantArgument,
    alias: Annotated[str, typer.Argument()],
    store: StoreOption = None,
    url: UrlOption = None,
) -> None:
    """Remove an alias."""
    open_registry(store).remove_alias(TenantId(tenant), AliasName(alias))
    out.print(f"removed {tenant}:{alias}; {tell_replicas(TenantId(tenant), url)}")


def audit(
    tenant: Annotated[str, typer.Argument(metavar="TENANT | verify", help="Whose log; or the word verify.")],
    verified: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="After verify: whose; everybody's by default.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="After verify TENANT: a link that you kept; its entry must still be there."),
    ] = None,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Who changed what of a tenant, oldest first; also of one that was deleted or erased.

    `audit verify` checks that no entry was altered, removed or added (exit code 6 if one was), and shows the
    last entry's link. Kept elsewhere, it finds a log that was written anew from its beginning too.
    """
    if tenant == "verify" or verified is not None:
        if tenant != "verify":
            raise InvalidInput("write: flatshare audit TENANT, or flatshare audit verify [TENANT]")
        if link is not None and verified is None:
            raise InvalidInput("--link is one tenant's: flatshare audit verify TENANT --link LINK")
        _verify_audit(verified, link, store, as_json=as_json)
        return
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


def _verify_audit(tenant: str | None, link: str | None, store: str | None, *, as_json: bool) -> None:
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


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Really delete; else only list.")] = False,
    grace_hours: Annotated[float, typer.Option(help="Spare what is younger.")] = DEFAULT_GRACE_S / 3600,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Remove weights that no version names (a dry run unless --delete)."""
    report = collect(open_registry(store).store, grace_s=grace_hours * 3600, remove=delete)
    if as_json:
        print_json(
            {
                "removed": report.removed,
                "garbage": [{"key": one.key, "size_bytes": one.size_bytes} for one in report.garbage],
                "size_bytes": report.size_bytes,
                "spared": report.spared,
                "live_blobs": report.live_blobs,
            }
        )
        return
    for one in report.garbage:
        out.print(f"{one.key}  {size(one.size_bytes)}", soft_wrap=True)
    verb = "deleted" if report.removed else "would delete (use --delete)"
    out.print(
        f"{verb}: {len(report.garbage)} objects, {size(report.size_bytes)}; "
        f"too young: {report.spared}; in use: {report.live_blobs} blobs"
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
