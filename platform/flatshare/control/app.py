"""Routes of the control plane. Changes go to the registry first, then to every replica at once."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi import FastAPI

from flatshare.api.http import ERROR_REPLIES, install_error_handlers
from flatshare.control.fleet import Fleet
from flatshare.control.schemas import (
    AliasChange,
    AliasChanged,
    AuditReply,
    FleetReply,
    ModelRequest,
    NewTenant,
    PreloadRequest,
    Refreshed,
    TenantReply,
    VersionReply,
)
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import AliasName, ModelRef, TenantId

__all__ = ["create_control_app"]

_ABOUT: Final = "Tenants, versions, aliases, and which replica holds what."


def create_control_app(registry: Registry, fleet: Fleet) -> FastAPI:
    """Build the control plane over a registry and a fleet; mounted under ``/admin``."""
    app = FastAPI(title="flatshare control plane", description=_ABOUT, version="1", responses=ERROR_REPLIES)
    install_error_handlers(app)
    _add_tenants(app, registry, fleet)
    _add_versions(app, registry, fleet)
    _add_aliases(app, registry, fleet)
    _add_fleet(app, fleet)
    return app


def _add_tenants(app: FastAPI, registry: Registry, fleet: Fleet) -> None:
    @app.get("/tenants", tags=["tenants"])
    def list_tenants() -> list[TenantReply]:
        """All tenants, by id."""
        return [TenantReply.of(head) for head in registry.list_tenants()]

    @app.post("/tenants", status_code=201, tags=["tenants"])
    async def create_tenant(body: NewTenant) -> TenantReply:
        """Create a tenant."""
        tenant = TenantId(body.id)
        head = await asyncio.to_thread(registry.create_tenant, tenant)
        await fleet.refresh(tenant)  # replicas may remember that it did not exist
        return TenantReply.of(head)

    @app.get("/tenants/{tenant}", tags=["tenants"])
    def show_tenant(tenant: str) -> TenantReply:
        """One tenant."""
        return TenantReply.of(registry.head(TenantId(tenant)))

    @app.delete("/tenants/{tenant}", tags=["tenants"])
    async def delete_tenant(tenant: str) -> Refreshed:
        """Delete a tenant, its versions and aliases; replicas free its models as their leases end."""
        parsed = TenantId(tenant)
        await asyncio.to_thread(registry.delete_tenant, parsed)
        return Refreshed(refreshed=await fleet.refresh(parsed))

    @app.post("/tenants/{tenant}/refresh", tags=["tenants"])
    async def refresh(tenant: str) -> Refreshed:
        """Have every replica read the tenant anew, and try its failed versions again."""
        return Refreshed(refreshed=await fleet.refresh(TenantId(tenant)))

    @app.get("/tenants/{tenant}/audit", tags=["tenants"])
    def audit(tenant: str) -> AuditReply:
        """Who changed what, oldest first."""
        return AuditReply(entries=registry.audit(TenantId(tenant)))


def _add_versions(app: FastAPI, registry: Registry, fleet: Fleet) -> None:
    @app.get("/tenants/{tenant}/versions", tags=["versions"])
    def list_versions(tenant: str) -> list[VersionReply]:
        """A tenant's versions, oldest first."""
        return [VersionReply.of(record) for record in registry.list_versions(TenantId(tenant))]

    @app.get("/tenants/{tenant}/versions/{version}", tags=["versions"])
    def show_version(tenant: str, version: int) -> VersionReply:
        """One version."""
        return VersionReply.of(registry.version(TenantId(tenant), version))

    @app.delete("/tenants/{tenant}/versions/{version}", tags=["versions"])
    async def delete_version(tenant: str, version: int) -> Refreshed:
        """Delete a version that no alias names."""
        parsed = TenantId(tenant)
        await asyncio.to_thread(registry.delete_version, parsed, version)
        return Refreshed(refreshed=await fleet.refresh(parsed))


def _add_aliases(app: FastAPI, registry: Registry, fleet: Fleet) -> None:
    async def changed(tenant: TenantId, change: Any, *arguments: Any) -> AliasChanged:
        head = await asyncio.to_thread(change, tenant, *arguments)
        return AliasChanged(tenant=TenantReply.of(head), refreshed=await fleet.refresh(tenant))

    @app.put("/tenants/{tenant}/aliases/{alias}", tags=["aliases"])
    async def set_alias(tenant: str, alias: str, body: AliasChange) -> AliasChanged:
        """Point an alias at a version: promote, when the alias is production."""
        return await changed(TenantId(tenant), registry.set_alias, AliasName(alias), body.version)

    @app.delete("/tenants/{tenant}/aliases/{alias}", tags=["aliases"])
    async def remove_alias(tenant: str, alias: str) -> AliasChanged:
        """Remove an alias."""
        return await changed(TenantId(tenant), registry.remove_alias, AliasName(alias))

    @app.post("/tenants/{tenant}/aliases/{alias}/rollback", tags=["aliases"])
    async def rollback(tenant: str, alias: str) -> AliasChanged:
        """Point an alias back at what it named before its last move."""
        return await changed(TenantId(tenant), registry.rollback, AliasName(alias))


def _add_fleet(app: FastAPI, fleet: Fleet) -> None:
    @app.get("/replicas", tags=["fleet"])
    async def replicas() -> FleetReply:
        """Every replica, the models in it, and fleet totals."""
        return FleetReply.of(await fleet.view())

    @app.post("/preload", tags=["fleet"])
    async def preload(body: PreloadRequest) -> Refreshed:
        """Make a model resident on every replica, before its first request; with `pin`, for good."""
        return Refreshed(refreshed=await fleet.preload(str(ModelRef.parse(body.model)), pin=body.pin))

    @app.post("/unpin", tags=["fleet"])
    async def unpin(body: ModelRequest) -> dict[str, int]:
        """Let a pinned model be evicted again; on how many replicas it was pinned."""
        return {"unpinned": await fleet.unpin(str(ModelRef.parse(body.model)))}

    @app.post("/unload", tags=["fleet"])
    async def unload(body: ModelRequest) -> dict[str, int]:
        """Free a model everywhere, as its leases end; it is loaded again at its next request."""
        return {"unloaded": await fleet.unload(str(ModelRef.parse(body.model)))}
