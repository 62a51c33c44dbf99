"""Both planes in one process, over ASGI, with authentication on; the replicas behind the control plane are played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from flatshare.api.app import create_app
from flatshare.api.hot import HotRoutes
from flatshare.api.identity import Identities, OperatorKeys, Role
from flatshare.api.tasks import Tasks
from flatshare.control.app import RegistryHeads, create_control_app
from flatshare.control.fleet import Fleet
from flatshare.control.keeper import Keeper
from flatshare.control.nodes import NodeDrain
from flatshare.control.scaling import Scaling
from flatshare.control.settings import RunningSettings
from flatshare.errors import NoSuchPipeline
from flatshare.models.architecture import architecture
from flatshare.pipelines.steps import batch_of, step_class
from flatshare.placement.scaling import Bounds
from flatshare.pool.details import ClusterNode, ReplicaState
from flatshare.pool.embedded_queue import EmbeddedQueue
from flatshare.replica.build import Replica
from flatshare.replica.identity import ReplicaIdentity
from flatshare.replica.receipt import EraseReceipt, HostReceipt
from flatshare.replica.request import InferenceService
from flatshare.settings import Settings
from flatshare.tasks.keeper import TaskKeeper
from flatshare.tasks.records import Answered, TaskId
from flatshare.tasks.store import TaskStore
from flatshare_registry import Registry, Scope, TenantId
from flatshare_registry.ids import AliasName
from flatshare_registry.keys import new_key
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

NETWORK = architecture("mnist-cnn")
MODEL = "serve_multiplexed_model_id"
ACME, GLOBEX = TenantId("acme"), TenantId("globex")


class TwoNodes:
    """A cluster whose second node has nothing on it."""

    def nodes(self) -> list[ClusterNode]:
        return [
            ClusterNode("aaaa", "10.0.0.1", "one", True, 1),
            ClusterNode("bbbb", "10.0.0.2", "two", False, 1),
        ]

    def replicas(self, node_id: str) -> list[str]:
        return []

    def leave(self, node_id: str) -> None:
        """It does."""


class OneReplica:
    """A Serve that keeps what it has."""

    def wanted(self) -> int:
        return 1

    def scale(self, replicas: int) -> None:
        raise AssertionError("nobody asked for it")

    def newest(self) -> str | None:
        return None

    def end(self, replica: str) -> None:
        raise AssertionError("nobody asked for it")


class Keys:
    """One key of each kind, for acme."""

    def __init__(self, registry: Registry, clock: ManualClock) -> None:
        tenancy = registry.tenancy
        short = tenancy.create_key(ACME, [Scope.PREDICT, Scope.MANAGE], lifetime_s=60)
        clock.advance(61)
        revoked = tenancy.create_key(ACME, [Scope.PREDICT, Scope.MANAGE])
        tenancy.revoke_key(ACME, revoked.id)
        good = tenancy.create_key(ACME, [Scope.PREDICT])
        other = new_key("acme").text.rpartition("_")[0]
        self.victim = tenancy.create_key(ACME, label="spare").id
        admin, viewer = new_key("ADMIN"), new_key("VIEWER")
        self.operators = OperatorKeys.of({Role.ADMIN: admin.text, Role.VIEWER: viewer.text})
        self.texts = {
            "no key": None,
            "bad key": f"fs_{good.id}_{'x' * 43}",
            "junk": f"{other}_{'y' * 43}"[:-1] + "z",
            "expired": short.text,
            "revoked": revoked.text,
            "other tenant's": tenancy.create_key(GLOBEX, [Scope.PREDICT, Scope.MANAGE]).text,
            "predict": good.text,
            "manage": tenancy.create_key(ACME, [Scope.MANAGE]).text,
            "both": tenancy.create_key(ACME, [Scope.PREDICT, Scope.MANAGE]).text,
            "admin": admin.text,
            "viewer": viewer.text,
            "bad admin": f"fs_{admin.id}_{'x' * 43}",
        }

    def headers(self, who: str, style: str = "bearer") -> dict[str, str]:
        text = self.texts[who]
        if text is None:
            return {}
        return {"authorization": f"Bearer {text}"} if style == "bearer" else {"x-api-key": text}


class Here:
    """The pipeline ``images``, whose step runs in this process."""

    names = ("images",)

    def check(self, name: str) -> None:
        if name not in self.names:
            raise NoSuchPipeline(f"there is no pipeline {name[:80]!a}")

    async def arrays(self, name: str, body: bytes, request_id: str, tenant: str) -> dict[str, Any]:
        return dict(step_class(name)().run(batch_of(body)))  # type: ignore[arg-type]  # this one is no coroutine


class Nowhere:
    """A queue that nobody works on."""

    def put(self, task: TaskId) -> None:
        """It waits."""

    def check_room(self, tenant: TenantId) -> None:
        """There is room."""


@dataclass
class Data:
    """A data plane with two tenants."""

    app: HotRoutes
    keys: Keys
    service: InferenceService
    task: str = ""


@contextlib.contextmanager
def data_plane(auth: bool = True) -> Iterator[Data]:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    registry = Registry(store, clock=clock)
    for seed, tenant in enumerate((ACME, GLOBEX)):
        registry.create_tenant(tenant)
        torch.manual_seed(seed)
        registry.register(tenant, save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors)
    keys = Keys(registry, clock)
    settings = Settings(slots=4, view_ttl_s=60, host_dir="off", max_ongoing_requests=8, max_queued_requests=8)
    replica = Replica.build(settings, store, identity=ReplicaIdentity("r1"))
    tasks = TaskStore(store, clock=clock)
    done = TaskId.new(ACME)
    tasks.take(done, "/predict", ACME, {}, b"{}", "operator", None)
    tasks.begin(done, "f")
    tasks.finish(done, "f", Answered(status=200, content_type="application/json", fence="f"), b"{}")
    app = create_app(
        replica.service, Identities(replica.heads, keys.operators if auth else None, clock=clock),
        replica=replica.name, max_body_bytes=10**6, max_rows=8, pipelines=Here(),
        tasks=Tasks(tasks, Nowhere()),
    )  # fmt: skip
    yield Data(app, keys, replica.service, str(done))
    # In a loop of its own: who uses this may be within one that runs.
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: asyncio.run(replica.close())).result()


class Replicas:
    """Stands where the pool's handle stands."""

    def broadcast(self, method: str, *arguments: object) -> Any:
        replies: dict[str, list[Any]] = {
            "erase": [EraseReceipt("r1", "n1", "cpu", 1, 10, clean=True, at=1.0)],
            "erase_host": [HostReceipt("r1", "n1", "n", ("a",), (), 10, 1.0)],
            "snapshot": [],
            "unload": [True],
            "unpin": [True],
        }

        class Answers:
            async def results_async(self, *, return_exceptions: bool) -> list[Any]:
                return replies.get(method, ["r1"])

        return Answers()


class Control:
    def __init__(self, folder: Path, auth: bool = True) -> None:
        clock = self.clock = ManualClock()
        self.registry = Registry(MemoryStore(clock=clock), clock=clock)
        for tenant in (ACME, GLOBEX):
            self.registry.create_tenant(tenant)
        for value in (1.0, 2.0, 3.0):
            self.registry.register(ACME, tiny_weights(value), "tiny", TINY_SPECS)
        for version in (1, 2):
            self.registry.set_alias(ACME, AliasName("canary"), version)
        self.keys = Keys(self.registry, clock)
        fleet = Fleet(Replicas(), lambda: [ReplicaState("r1", "RUNNING", "127.0.0.1")])
        operators = self.keys.operators if auth else None
        self.app = create_control_app(
            self.registry, fleet, Identities(RegistryHeads(self.registry), operators, clock=clock),
            RunningSettings(Settings()),
            erasure_key_file=folder / "erasure.key", scaling=Scaling(
                Keeper(fleet, OneReplica(), Bounds(1, 1), 4.0), lambda *_: None
            ), nodes=NodeDrain(TwoNodes(), fleet, dict, "pool/"), task_keeper=TaskKeeper(
                TaskStore(self.registry.store), EmbeddedQueue(folder / "tasks.sqlite", 9, 9), OneReplica(),
                Bounds(0, 4), 4, 45.0,
            ),
        )  # fmt: skip

    def state(self) -> dict[str, bytes]:
        store = self.registry.store
        return {meta.key: store.get(meta.key).data for meta in store.list("")}
