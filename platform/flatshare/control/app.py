"""Routes of the control plane. Changes go to the registry first, then to every replica at once.

Long, because it is a table: all routes with what the OpenAPI says of them, and little else.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, Header, Query, Request, Response

from flatshare.api.http import ERROR_REPLIES, install_error_handlers, request_id_of
from flatshare.api.identity import Identities
from flatshare.api.openapi import documented
from flatshare.control.access import Gate, caller_of
from flatshare.control.erasure import Erasing, Erasure, Erasures
from flatshare.control.erasure_record import Record, Signer
from flatshare.control.fleet import Fleet, Told
from flatshare.control.fleet_schemas import FleetReply
from flatshare.control.history import History, HistoryReply
from flatshare.control.metrics import ScrapeTarget, exposition
from flatshare.control.nodes import DrainedNodeReply, NodeDrain
from flatshare.control.scaling import DrainedReply, Scaling, ScalingReply, ScalingRequest
from flatshare.control.schemas import (
    AliasChange,
    AliasChanged,
    AuditReply,
    AuditVerified,
    ErasingReply,
    KeyReply,
    ModelRequest,
    NewKeyReply,
    NewKeyRequest,
    NewTenant,
    PlansReply,
    PreloadRequest,
    QuotasReply,
    QuotasRequest,
    Refreshed,
    RollbackRequest,
    RotateRequest,
    TenantReply,
    Unloaded,
    Unpinned,
    VersionNumber,
    VersionReply,
    told,
)
from flatshare.control.settings import RunningSettings, SettingsChange, SettingsReply
from flatshare.control.tasks import TaskQueueReply
from flatshare.control.ui import add_ui
from flatshare.engine.quotas import effective_quotas
from flatshare.errors import FleetUnavailable, NoTasks, ServeError, TooManyAtOnce
from flatshare.replica.exposition import CONTENT_TYPE
from flatshare.tasks.keeper import TaskKeeper
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import InvalidInput
from flatshare_registry.identity import StoreIdentity
from flatshare_registry.ids import AliasName, ModelRef, TenantId
from flatshare_registry.records import DEFAULT_PLAN, Action, Quotas, TenantHead

__all__ = ["RegistryHeads", "create_control_app"]

MAX_AUDIT_ENTRIES: Final = 1000
"""Most entries in one answer: each is an object in the store."""

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Names this request, when it may be sent more than once; as random as a UUID.",
    ),
]

NOBODY_TOLD: Final = Told((), ())

_ABOUT: Final = "Tenants, versions, aliases, and which replica holds what."


class RegistryHeads:
    """Heads for checking keys, read anew for each request: a key that was revoked is refused at once."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def head_now(self, tenant: TenantId) -> TenantHead | None:
        """None is known without asking."""
        return None

    async def head(self, tenant: TenantId) -> TenantHead:
        """See :class:`flatshare.api.identity.Heads`."""
        return await asyncio.to_thread(self._registry.head, tenant)


_PLAIN_TEXT: Final[dict[str, Any]] = {"content": {"text/plain": {"schema": {"type": "string"}}}}


def create_control_app(
    registry: Registry,
    fleet: Fleet,
    identities: Identities,
    running: RunningSettings,
    erasure_key_file: Path | None = None,
    *,
    scaling: Scaling | None = None,
    nodes: NodeDrain | None = None,
    task_keeper: TaskKeeper | None = None,
    history: History | None = None,
) -> Gate:
    """Build the control plane over a registry and a fleet; mounted under ``/admin``.

    Parameters
    ----------
    identities
        Tells who calls; :mod:`flatshare.control.access` says who may.
    running
        Plans and what else can change in place.
    erasure_key_file
        Where the key that signs erasure records is, or will be; None: nothing can be erased.
    scaling
        Decides copies and replicas; None: nobody does.
    nodes
        Takes nodes out of the cluster; None: nobody does.
    task_keeper
        Tends tasks; None: none are taken.
    history
        Keeps the last hour; None: nobody does.
    """
    app = FastAPI(
        title="flatshare control plane", description=_ABOUT, version="1", responses=ERROR_REPLIES,
        redirect_slashes=False, docs_url=None, redoc_url=None,
        generate_unique_id_function=lambda route: route.name,  # what clients' functions are called
    )  # fmt: skip
    install_error_handlers(app)
    _add_tenants(app, registry, fleet)
    _add_leaving(app, registry, fleet, erasure_key_file)
    _add_keys(app, registry, fleet)
    _add_quotas(app, registry, fleet, running)
    _add_versions(app, registry, fleet)
    _add_aliases(app, registry, fleet)
    _add_fleet(app, registry, fleet, scaling, running, task_keeper, history)
    add_ui(app)
    _add_scaling(app, scaling)
    _add_nodes(app, nodes)
    _add_tasks(app, task_keeper)
    _add_settings(app, fleet, running)
    documented(app)
    return Gate(app, identities, StoreIdentity(registry.store))


def _for(registry: Registry, request: Request) -> Registry:
    """The registry, for changes in the name of whoever calls."""
    return registry.acting_as(caller_of(request).name, request_id_of(request.headers))


def _add_tenants(app: FastAPI, registry: Registry, fleet: Fleet) -> None:
    @app.get("/tenants", tags=["tenants"])
    def list_tenants() -> list[TenantReply]:
        """All tenants, by id."""
        return [TenantReply.of(head) for head in registry.list_tenants()]

    @app.post("/tenants", status_code=201, tags=["tenants"])
    async def create_tenant(body: NewTenant, request: Request) -> TenantReply:
        """Create a tenant."""
        tenant = TenantId(body.id)
        head = await asyncio.to_thread(_for(registry, request).create_tenant, tenant)
        await fleet.refresh(tenant)  # replicas may remember that it did not exist
        return TenantReply.of(head)

    @app.get("/tenants/{tenant}", tags=["tenants"])
    def show_tenant(tenant: str) -> TenantReply:
        """One tenant."""
        return TenantReply.of(registry.head(TenantId(tenant)))

    @app.delete("/tenants/{tenant}", tags=["tenants"])
    async def delete_tenant(tenant: str, request: Request) -> Refreshed:
        """Delete a tenant, its versions, aliases and keys; replicas free its models as their leases end."""
        parsed = TenantId(tenant)
        await asyncio.to_thread(_for(registry, request).delete_tenant, parsed)
        return Refreshed.of(await fleet.refresh(parsed))

    @app.post("/tenants/{tenant}/refresh", tags=["tenants"])
    async def refresh(tenant: str) -> Refreshed:
        """Have every replica read the tenant anew, and try its failed versions again."""
        return Refreshed.of(await fleet.refresh(TenantId(tenant)))

    @app.get("/tenants/{tenant}/audit", tags=["tenants"])
    def audit(
        tenant: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MAX_AUDIT_ENTRIES, description="Most entries.")] = 100,
        before: Annotated[
            str | None,
            Query(
                pattern="^[0-9A-HJKMNP-TV-Z]{26}$",
                description="Entries older than this one: a page's `next`.",
            ),
        ] = None,
    ) -> AuditReply:
        """Who changed what: the newest entries, or the newest before one; oldest first within the page."""
        own = caller_of(request).tenant is not None
        entries, more = registry.audit_page(TenantId(tenant), limit, before, own=own)
        return AuditReply(entries=entries, next=entries[0].id if more else None)

    verifying: set[TenantId] = set()

    @app.get("/tenants/{tenant}/audit/verify", tags=["tenants"])
    async def verify_audit(tenant: str) -> AuditVerified:
        """Whether no entry of the log was altered, removed or added. One at a time: it reads all of them."""
        parsed = TenantId(tenant)
        if parsed in verifying:
            raise TooManyAtOnce(f"the log of {parsed} is being verified; ask again when that is done")
        verifying.add(parsed)
        # It goes on without a caller that leaves: threads can't be stopped.
        job = asyncio.ensure_future(asyncio.to_thread(verified, parsed))
        job.add_done_callback(lambda _: verifying.discard(parsed))
        return await asyncio.shield(job)

    def verified(tenant: TenantId) -> AuditVerified:
        problems = registry.verify_audit(tenant)
        last = registry.last_entry(tenant)
        return AuditVerified(
            whole=not problems, problems=problems, entries=last.revision, last_link=last.link
        )


def _add_leaving(app: FastAPI, registry: Registry, fleet: Fleet, erasure_key_file: Path | None) -> None:
    @app.post("/tenants/{tenant}/suspend", tags=["tenants"])
    async def suspend(tenant: str, request: Request) -> Refreshed:
        """Refuse the tenant's requests from now on; nothing is deleted."""
        parsed = TenantId(tenant)
        await asyncio.to_thread(_for(registry, request).tenancy.suspend, parsed)
        return Refreshed.of(await fleet.refresh(parsed))

    @app.post("/tenants/{tenant}/resume", tags=["tenants"])
    async def resume(tenant: str, request: Request) -> Refreshed:
        """Answer a suspended tenant's requests again."""
        parsed = TenantId(tenant)
        await asyncio.to_thread(_for(registry, request).tenancy.resume, parsed)
        return Refreshed.of(await fleet.refresh(parsed))

    erasures = Erasures()

    @app.post("/tenants/{tenant}/erase", tags=["tenants"], responses={202: {"model": ErasingReply}})
    async def erase(tenant: str, request: Request, response: Response) -> Record | ErasingReply:
        """Erase a tenant from store, nodes and replicas; the signed record of it.

        One that takes long goes on without the caller (202): ask again, for its end. One that failed is
        finished by asking again, too.
        """
        if erasure_key_file is None:
            raise ServeError("this control plane has no key to sign erasure records with")
        signer = await asyncio.to_thread(Signer, erasure_key_file)
        erasure = Erasure(_for(registry, request), fleet, signer)
        found = await erasures.run(TenantId(tenant), erasure, caller_of(request).name)
        if isinstance(found, Erasing):
            response.status_code, response.headers["retry-after"] = 202, "1"
            return ErasingReply(since=found.since, step=found.step)
        return found


def _add_keys(app: FastAPI, registry: Registry, fleet: Fleet) -> None:
    @app.get("/tenants/{tenant}/keys", tags=["keys"])
    def list_keys(tenant: str) -> list[KeyReply]:
        """A tenant's API keys, without their secrets."""
        parsed = TenantId(tenant)
        head, used = registry.head(parsed), registry.tenancy.last_used(parsed)
        return [KeyReply.of(key, used.get(key.id)) for key in head.keys.values()]

    @app.post("/tenants/{tenant}/keys", status_code=201, tags=["keys"])
    async def create_key(
        tenant: str, body: NewKeyRequest, request: Request, idempotency_key: IdempotencyKey = None
    ) -> NewKeyReply:
        """Make an API key. The answer has its secret, which is stored nowhere.

        Sent again with the same `Idempotency-Key` it makes no second key: 409, which names the first.
        """
        parsed = TenantId(tenant)
        made = await asyncio.to_thread(
            _for(registry, request).tenancy.create_key,
            parsed,
            body.scopes,
            label=body.label,
            lifetime_s=body.lifetime_s,
            once=idempotency_key,
        )
        return NewKeyReply(id=made.id, key=made.text, **told(await fleet.refresh(parsed)))

    @app.post("/tenants/{tenant}/keys/{key_id}/rotate", status_code=201, tags=["keys"])
    async def rotate_key(
        tenant: str,
        key_id: str,
        body: RotateRequest,
        request: Request,
        idempotency_key: IdempotencyKey = None,
    ) -> NewKeyReply:
        """Make a key like this one, which goes on being good for a while.

        Sent again with the same `Idempotency-Key` it makes no second key: 409, which names the first.
        """
        parsed = TenantId(tenant)
        made = await asyncio.to_thread(
            _for(registry, request).tenancy.rotate_key,
            parsed,
            key_id,
            grace_s=body.grace_s,
            once=idempotency_key,
        )
        return NewKeyReply(id=made.id, key=made.text, **told(await fleet.refresh(parsed)))

    @app.delete("/tenants/{tenant}/keys/{key_id}", tags=["keys"])
    async def revoke_key(tenant: str, key_id: str, request: Request) -> Refreshed:
        """Take a key away, at once on every replica that answers."""
        parsed = TenantId(tenant)
        await asyncio.to_thread(_for(registry, request).tenancy.revoke_key, parsed, key_id)
        return Refreshed.of(await fleet.refresh(parsed))


def _add_quotas(app: FastAPI, registry: Registry, fleet: Fleet, running: RunningSettings) -> None:
    def reply(head: TenantHead, now: Told = NOBODY_TOLD) -> QuotasReply:
        settings = running.settings
        effective = effective_quotas(head, settings.plans, settings.default_quotas)
        return QuotasReply(plan=head.plan, own=head.quotas, effective=effective, **told(now))

    @app.get("/tenants/{tenant}/quotas", tags=["quotas"])
    def show_quotas(tenant: str) -> QuotasReply:
        """A tenant's plan, what of it is different, and what holds."""
        return reply(registry.head(TenantId(tenant)))

    @app.put("/tenants/{tenant}/quotas", tags=["quotas"])
    async def set_quotas(tenant: str, body: QuotasRequest, request: Request) -> QuotasReply:
        """Set the plan, and all that is different from it."""
        plans = {DEFAULT_PLAN, *running.settings.plans}
        if body.plan is not None and body.plan not in plans:
            raise InvalidInput(f"there is no plan {body.plan[:80]!a}; there are {sorted(plans)}")
        parsed = TenantId(tenant)
        head = await asyncio.to_thread(
            _for(registry, request).tenancy.set_quotas, parsed, body.quotas, plan=body.plan
        )
        return reply(head, await fleet.refresh(parsed))


def _add_versions(app: FastAPI, registry: Registry, fleet: Fleet) -> None:
    @app.get("/tenants/{tenant}/versions", tags=["versions"])
    def list_versions(tenant: str) -> list[VersionReply]:
        """A tenant's versions, oldest first."""
        return [VersionReply.of(record) for record in registry.list_versions(TenantId(tenant))]

    @app.get("/tenants/{tenant}/versions/{version}", tags=["versions"])
    def show_version(tenant: str, version: VersionNumber) -> VersionReply:
        """One version."""
        return VersionReply.of(registry.version(TenantId(tenant), version))

    @app.delete("/tenants/{tenant}/versions/{version}", tags=["versions"])
    async def delete_version(tenant: str, version: VersionNumber, request: Request) -> Refreshed:
        """Delete a version that no alias names."""
        parsed = TenantId(tenant)
        await asyncio.to_thread(_for(registry, request).delete_version, parsed, version)
        return Refreshed.of(await fleet.refresh(parsed))


def _add_aliases(app: FastAPI, registry: Registry, fleet: Fleet) -> None:
    async def changed(tenant: TenantId, change: Any, *arguments: Any) -> AliasChanged:
        head = await asyncio.to_thread(change, tenant, *arguments)
        return AliasChanged(tenant=TenantReply.of(head), **told(await fleet.refresh(tenant)))

    @app.put("/tenants/{tenant}/aliases/{alias}", tags=["aliases"])
    async def set_alias(tenant: str, alias: str, body: AliasChange, request: Request) -> AliasChanged:
        """Point an alias at a version: promote, when the alias is production."""
        acting = _for(registry, request)
        return await changed(TenantId(tenant), acting.set_alias, AliasName(alias), body.version)

    @app.delete("/tenants/{tenant}/aliases/{alias}", tags=["aliases"])
    async def remove_alias(tenant: str, alias: str, request: Request) -> AliasChanged:
        """Remove an alias."""
        return await changed(TenantId(tenant), _for(registry, request).remove_alias, AliasName(alias))

    @app.post("/tenants/{tenant}/aliases/{alias}/rollback", tags=["aliases"])
    async def rollback(
        tenant: str, alias: str, request: Request, body: RollbackRequest | None = None
    ) -> AliasChanged:
        """Point an alias back at what it named before its last move; with `expected`, once only."""
        back = partial(_for(registry, request).rollback, expected=body.expected if body else None)
        return await changed(TenantId(tenant), back, AliasName(alias))


def _add_settings(app: FastAPI, fleet: Fleet, running: RunningSettings) -> None:
    @app.get("/plans", tags=["quotas"])
    def list_plans() -> PlansReply:
        """The plans that a tenant can be on, and their limits."""
        return PlansReply(plans={DEFAULT_PLAN: Quotas(), **running.settings.plans})

    @app.get("/settings", tags=["fleet"])
    async def get_settings() -> SettingsReply:
        """The settings that can change in place. `GET /replicas` says which replica goes by them."""
        return SettingsReply.now(running, NOBODY_TOLD)

    @app.patch("/settings", tags=["fleet"])
    async def change_settings(body: SettingsChange) -> SettingsReply:
        """Change some of them in the control plane and in every replica, until the platform ends."""
        who = await running.change(body.settings, fleet)
        return SettingsReply.now(running, who)


def _add_scaling(app: FastAPI, scaling: Scaling | None) -> None:
    def known() -> Scaling:
        if scaling is None:
            raise FleetUnavailable("nobody decides how many replicas there are")
        return scaling

    @app.get("/scaling", tags=["fleet"])
    async def get_scaling() -> ScalingReply:
        """How many replicas are wanted, and what is allowed."""
        return ScalingReply.of(known().placement)

    @app.put("/scaling", tags=["fleet"])
    async def set_scaling(body: ScalingRequest) -> ScalingReply:
        """Allow other numbers of replicas, until the platform ends; equal ones fix it."""
        return ScalingReply.of(await known().allow(body.min_replicas, body.max_replicas))

    @app.post("/replicas/{replica}/drain", tags=["fleet"])
    async def drain(replica: str) -> DrainedReply:
        """Empty a replica and have it replaced: others load what it holds first, and no request is lost."""
        done = await known().drain(replica)
        return DrainedReply(
            replica=done.replica, handed_over=done.handed_over, waited_s=round(done.waited_s, 3)
        )


def _add_nodes(app: FastAPI, nodes: NodeDrain | None) -> None:
    @app.post("/nodes/{node}/drain", tags=["fleet"], responses={202: {"model": DrainedNodeReply}})
    async def drain_node(node: str, response: Response) -> DrainedNodeReply:
        """Take a node out of the cluster: its models move first, then its replicas.

        202: it goes on; ask again.
        """
        if nodes is None:
            raise FleetUnavailable("nobody takes nodes out of this cluster")
        reply = await nodes.drain(node)
        response.status_code = 202 if reply.left else 200
        return reply


def _add_tasks(app: FastAPI, keeper: TaskKeeper | None) -> None:
    @app.get("/tasks", tags=["fleet"])
    async def get_task_queue() -> TaskQueueReply:
        """How many tasks wait, and how many consumers run them."""
        if keeper is None:
            raise NoTasks("no tasks are taken here; FLATSHARE_TASKS turns them on")
        return TaskQueueReply.of(keeper.tended)


def _add_fleet(
    app: FastAPI,
    registry: Registry,
    fleet: Fleet,
    scaling: Scaling | None,
    running: RunningSettings,
    task_keeper: TaskKeeper | None,
    history: History | None,
) -> None:
    async def noted(request: Request, model: str, action: Action, **detail: str) -> str:
        """Note in the tenant's log what is going to be done with a model; returns its ref."""
        ref = ModelRef.parse(model)
        note = _for(registry, request).note
        await asyncio.to_thread(note, ref.tenant, action, {"model": str(ref), **detail})
        return str(ref)

    @app.get("/replicas", tags=["fleet"])
    async def replicas() -> FleetReply:
        """Every replica, the models in it, and fleet totals."""
        placement = scaling.placement if scaling is not None else None
        return FleetReply.of(await fleet.view(), placement, running.revision)

    @app.get("/metrics", tags=["fleet"], response_class=Response, responses={200: _PLAIN_TEXT})
    async def metrics() -> Response:
        """The fleet in Prometheus' text format; `platform/METRICS.md` says what each number is."""
        view = await fleet.view()
        placement = scaling.placement if scaling is not None else None
        queue = TaskQueueReply.of(task_keeper.tended) if task_keeper is not None else None
        text = exposition(view, placement, queue, running.settings.metrics_tenants)
        return Response(text, media_type=CONTENT_TYPE)

    @app.get("/metrics/targets", tags=["fleet"])
    async def metrics_targets() -> list[ScrapeTarget]:
        """Each replica's own metrics, for Prometheus' HTTP service discovery."""
        return [ScrapeTarget.of(door) for door in sorted(await fleet.doors(), key=lambda one: one.place)]

    @app.get("/history", tags=["fleet"])
    async def get_history() -> HistoryReply:
        """The last hour in few numbers, and the busiest tenants of the last minute: what the page draws."""
        return history.reply if history is not None else HistoryReply(points=[], tenants=[])

    @app.post("/preload", tags=["fleet"])
    async def preload(body: PreloadRequest, request: Request) -> Refreshed:
        """Make a model resident on every replica, before its first request.

        With `pin`, for good, and on replicas that start later too.
        """
        pin = "yes" if body.pin else "no"
        model = await noted(request, body.model, Action.FLEET_PRELOAD, pin=pin)
        done = await fleet.preload(model, pin=body.pin)
        if body.pin:  # only now: a model that had no room is not demanded of every replica that starts
            await asyncio.to_thread(registry.pins.add, ModelRef.parse(model))
        return Refreshed.of(done)

    @app.post("/unpin", tags=["fleet"])
    async def unpin(body: ModelRequest, request: Request) -> Unpinned:
        """Let a pinned model be evicted again; on how many replicas it was pinned."""
        model = await noted(request, body.model, Action.FLEET_UNPIN)
        await asyncio.to_thread(registry.pins.remove, ModelRef.parse(model))
        return Unpinned(unpinned=await fleet.unpin(model))

    @app.post("/unload", tags=["fleet"])
    async def unload(body: ModelRequest, request: Request) -> Unloaded:
        """Free a model everywhere, as its leases end, and end its pin; its next request loads it again."""
        model = await noted(request, body.model, Action.FLEET_UNLOAD)
        await asyncio.to_thread(registry.pins.remove, ModelRef.parse(model))
        return Unloaded(unloaded=await fleet.unload(model))
