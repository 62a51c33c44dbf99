"""Verbs of tenancy: API keys, suspension, erasure, moving a tenant to another registry."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import httpx
import typer

from flatshare.cli.answers import Erased, Erasing, parsed
from flatshare.cli.context import (
    StoreOption,
    UrlOption,
    call,
    need_serve_extra,
    open_registry,
    own_store,
    platform_url,
    registry_for_change,
    tell_replicas,
)
from flatshare.cli.output import (
    AsJson,
    err,
    need_stdout,
    out,
    print_json,
    print_table,
    printable,
    progress_bar,
    size,
    when,
)
from flatshare.cli.quotas_verbs import quotas_app
from flatshare.settings import load_settings
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, InvalidInput, Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.keys import NewKey
from flatshare_registry.records import Scope
from flatshare_registry.transfer import export_tenant, import_tenant, read_head

keys_app = typer.Typer(help="Make, list, rotate and revoke tenants' API keys.", no_args_is_help=True)
erasure_app = typer.Typer(help="Records of erased tenants.", no_args_is_help=True)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY_ID", help="As `keys list` shows it.")]

HOUR_S = 3600.0
ERASE_TIMEOUT_S = 60.0
ERASE_TRIES = 5
ERASE_AGAIN_S = 2.0
DAY_S = 86_400.0


def add_to(app: typer.Typer, tenants_app: typer.Typer) -> None:
    """Add these verbs to the command, and to its `tenants`."""
    app.add_typer(keys_app, name="keys", rich_help_panel="Tenancy")
    app.add_typer(quotas_app, name="quotas", rich_help_panel="Tenancy")
    app.add_typer(erasure_app, name="erasure", rich_help_panel="Tenancy")
    for name, function in (
        ("suspend", suspend), ("resume", resume), ("erase", erase), ("export", export), ("import", import_),
    ):  # fmt: skip
        tenants_app.command(name)(function)


# -- keys


@keys_app.command("create")
def create_key(
    tenant: TenantArgument,
    scope: Annotated[
        list[Scope] | None, typer.Option(help="predict (default) or manage; repeatable.")
    ] = None,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    days: Annotated[
        float | None, typer.Option(min=0, help="Days until it expires; never by default.")
    ] = None,
    store: StoreOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key. It is shown once and stored nowhere."""
    need_stdout()
    registry = registry_for_change(store, url)
    made = registry.tenancy.create_key(
        TenantId(tenant),
        scope or [Scope.PREDICT],
        label=label,
        lifetime_s=None if days is None else days * DAY_S,
    )
    _show_new(registry, TenantId(tenant), made, url, as_json=as_json)


@keys_app.command("rotate")
def rotate_key(
    key_id: KeyArgument,
    grace_hours: Annotated[float, typer.Option(min=0, help="How long the old key goes on being good.")] = 24,
    store: StoreOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Make a key like another one; the old key ends after a grace period."""
    need_stdout()
    tenant = _tenant_of(key_id)
    registry = registry_for_change(store, url)
    made = registry.tenancy.rotate_key(tenant, key_id, grace_s=grace_hours * HOUR_S)
    _show_new(registry, tenant, made, url, as_json=as_json)


@keys_app.command("revoke")
def revoke_key(key_id: KeyArgument, store: StoreOption = None, url: UrlOption = None) -> None:
    """Take a key away, at once where a platform runs."""
    tenant = _tenant_of(key_id)
    registry = registry_for_change(store, url)
    registry.tenancy.revoke_key(tenant, key_id)
    told = tell_replicas(registry, tenant, url)
    out.print(f"revoked {key_id}; {told}", soft_wrap=True)
    told.check()


@keys_app.command("list")
def list_keys(tenant: TenantArgument, store: StoreOption = None, as_json: AsJson = False) -> None:
    """List a tenant's keys, without their secrets."""
    registry = open_registry(store)
    head = registry.head(TenantId(tenant))
    used = registry.tenancy.last_used(TenantId(tenant))
    if as_json:
        print_json(
            [
                {**key.model_dump(mode="json", exclude={"sha256"}), "last_used_at": _iso(used.get(key.id))}
                for key in head.keys.values()
            ]
        )
        return
    now = datetime.now(UTC)
    print_table(
        "",
        ["key", "scopes", "label", "created", "by", "expires", "used (hour)"],
        [
            (
                key.id,
                " ".join(key.scopes),
                key.label,
                when(key.created_at),
                key.created_by,
                "never"
                if key.expires_at is None
                else when(key.expires_at) + (" (over)" if key.expires_at <= now else ""),
                when(used[key.id]) if key.id in used else "never",
            )
            for key in head.keys.values()
        ],
    )


def _show_new(registry: Registry, tenant: TenantId, made: NewKey, url: str | None, *, as_json: bool) -> None:
    """Show a new key before a platform is told of it: it can't be shown again, even if the telling fails."""
    if as_json:
        print_json({"id": made.id, "key": made.text})
    else:
        out.print(made.text, soft_wrap=True)
    sys.stdout.flush()
    told = tell_replicas(registry, tenant, url)
    if not as_json:
        err.print(f"key {made.id}; {told}. It is not stored: keep it now.", soft_wrap=True)
    told.check()


def _tenant_of(key_id: str) -> TenantId:
    """The tenant in a key's id; refuses a whole key, which must not stand in a shell's history."""
    if key_id.startswith("fs_"):
        raise InvalidInput("name the key's id (acme.q3v7k2m9d1), not the key itself")
    return TenantId(key_id.partition(".")[0])


# -- suspend, resume


def suspend(tenant: TenantArgument, store: StoreOption = None, url: UrlOption = None) -> None:
    """Refuse a tenant's requests from now on; nothing is deleted."""
    registry = registry_for_change(store, url)
    registry.tenancy.suspend(TenantId(tenant))
    told = tell_replicas(registry, TenantId(tenant), url)
    out.print(f"{tenant} is suspended; {told}", soft_wrap=True)
    told.check()


def resume(tenant: TenantArgument, store: StoreOption = None, url: UrlOption = None) -> None:
    """Answer a suspended tenant's requests again."""
    registry = registry_for_change(store, url)
    registry.tenancy.resume(TenantId(tenant))
    told = tell_replicas(registry, TenantId(tenant), url)
    out.print(f"{tenant} is active; {told}", soft_wrap=True)
    told.check()


# -- leaving


def erase(
    tenant: TenantArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Erase a tenant for good: from replicas, nodes and the store. Run again, it finishes."""
    leaving = TenantId(tenant)
    if not yes:
        typer.confirm(f"Erase tenant {tenant}, its weights and keys, everywhere and for good?", abort=True)
    with err.status("erasing ...") as status:
        route = f"{platform_url(url)}/admin/tenants/{leaving}/erase"
        record = _erase(route, lambda step: status.update(f"erasing: {printable(step)} ..."))
    if as_json:
        print_json(record)
        return
    kept = [one["digest"][:12] for one in record["store"]["kept_blobs"]]
    out.print(
        f"erased {tenant}: {len(record['versions'])} versions; "
        f"{len(record['store']['removed_blobs'])} blobs, {record['store']['objects']} objects of the store; "
        f"{sum(one['models'] for one in record['replicas'])} models "
        f"on {len(record['replicas'])} replicas; "
        f"{sum(len(one['removed_tensors']) for one in record['nodes'])} files "
        f"on {len(record['nodes'])} nodes",
        soft_wrap=True,
    )
    if record["store"].get("versions_checked") is False:
        out.print(
            "the store can't list versions: if it keeps earlier ones, remove those by its own means",
            soft_wrap=True,
        )
    if kept:
        out.print(f"kept, because another tenant has registered the same weights: {', '.join(kept)}")
    out.print(f"record {record['id']}, signed with {record['signature']['public_key']}", soft_wrap=True)


def _erase(route: str, tell: Callable[[str], None]) -> Erased:
    """Ask until it is done, also while a replica that died owes a receipt: every step can be done again."""
    left = ERASE_TRIES
    while True:
        try:
            reply = call("POST", route, timeout=ERASE_TIMEOUT_S, headers=own_store())
            if reply.status_code == httpx.codes.OK:
                return parsed(reply, Erased)
            tell(parsed(reply, Erasing)["step"])  # it goes on; the next request waits for its end
        except Unavailable as error:
            left -= 1
            if not left:
                raise
            err.print(f"not finished: {error.message}; again ...", soft_wrap=True)
            time.sleep(ERASE_AGAIN_S)  # replicas come and go; nothing here can be awaited


@erasure_app.command("verify")
def verify_erasure(
    tenant: TenantArgument,
    public_key: Annotated[
        str | None,
        typer.Option(
            help="Public key of the signature, in hex; by default this machine's own key, if it has one."
        ),
    ] = None,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Check an erased tenant's records and tombstone, and that nothing of it is stored (else exit code 6)."""
    need_serve_extra()
    from flatshare.control.erasure_record import Signer, erasure_problems, read_records
    from flatshare.local.keys import key_file

    erased = TenantId(tenant)
    registry = open_registry(store)
    own = Path(load_settings().erasure_key_file or key_file("erasure"))
    if public_key is None and own.exists():
        public_key = Signer(own).public_key
    records = read_records(registry.store, erased)
    problems, notes = erasure_problems(registry, erased, records, public_key)
    if as_json:
        print_json({"good": not problems, "problems": problems, "notes": notes, "records": records})
    else:
        for record in records:
            signature = record.get("signature")
            signer = str(signature.get("public_key", "?")) if isinstance(signature, dict) else "?"
            finished = record.get("finished_at")
            shown = when(float(finished)) if isinstance(finished, int | float) else "?"
            out.print(printable(f"record {record.get('id')}: {shown}, signed with {signer}"), soft_wrap=True)
        if public_key is None:
            out.print("whose key that is only its owner can say: compare it, or give --public-key")
        for note in notes:
            out.print(printable(note), soft_wrap=True)
        if not problems:
            out.print(f"good: {len(records)} records of {tenant}, and nothing of it is in the store")
    if problems:
        raise Corrupt("; ".join(problems))


def export(
    tenant: TenantArgument,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    store: StoreOption = None,
) -> None:
    """Write all that the registry has of a tenant into a folder: weights, records, log, hashes of keys."""
    with progress_bar("versions") as progress:
        done = export_tenant(open_registry(store).store, TenantId(tenant), folder, progress)
    out.print(
        f"exported {tenant} to {folder}: {done['versions']} versions, {done['blobs']} blobs "
        f"({size(done['blob_bytes'])}), {done['log']} log entries"
    )


def import_(
    folder: Annotated[Path, typer.Argument(help="What `export` wrote.")],
    with_quotas: Annotated[
        bool, typer.Option("--with-quotas", help="Also take over its plan and limits; else the default plan.")
    ] = False,
    store: StoreOption = None,
    url: UrlOption = None,
) -> None:
    """Bring an exported tenant into this registry; all of it is checked first."""
    registry = registry_for_change(store, url)
    with progress_bar("blobs") as progress:
        done = import_tenant(registry.store, folder, progress, actor=registry.actor, with_quotas=with_quotas)
    told = tell_replicas(registry, TenantId(read_head(folder).tenant), url)
    out.print(
        f"imported {done['versions']} versions, {done['blobs']} blobs ({size(done['blob_bytes'])}), "
        f"{done['log']} log entries; {told}",
        soft_wrap=True,
    )
    told.check()


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
