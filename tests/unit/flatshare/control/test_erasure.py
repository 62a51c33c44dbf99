"""Erasure across replicas: asked until everybody is clean, and a record whose signature can be checked."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flatshare.control import erasure as erasure_module
from flatshare.control.erasure import Erasing, Erasure, Erasures
from flatshare.control.erasure_record import Signer, erasure_problems, read_records, verify_record
from flatshare.control.fleet import Fleet
from flatshare.errors import FleetUnavailable, ServeError
from flatshare.pool.details import ReplicaState
from flatshare.replica.receipt import EraseReceipt, HostReceipt
from flatshare_registry import Registry, TenantId, layout
from flatshare_registry.errors import NotFound
from flatshare_registry.stores.base import Create, Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.stores.s3 import S3Options, S3Store, make_s3_client
from flatshare_registry.testing.faults import DisorderedStore
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

from ....odd_s3 import ODDITIES, odd_s3

ACME = TenantId("acme")


class Replicas:
    """Two replicas on one node; r2 needs a few askings, or dies."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.calls: list[str] = []
        self.running = ["r1", "r2"]
        self.clean_after = 3
        self.resolved_at_fence = False

    def states(self) -> list[ReplicaState]:
        return [ReplicaState(name, "RUNNING", "127.0.0.1") for name in self.running]

    def broadcast(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        asked = self.calls.count("erase")
        results: list[Any] = ["r1", "r2"]
        if method == "fence":
            self.resolved_at_fence = self.registry.last_entry(ACME).action != "tenant.erased"
        if method == "erase":
            with pytest.raises(NotFound):
                self.registry.head(ACME)
            results = [
                EraseReceipt(
                    name, "n1", "cuda", 1, 100, name == "r1" or asked > self.clean_after, float(asked)
                )
                for name in self.running
            ]
        if method == "erase_host":
            first = self.calls.count("erase_host") == 1
            removed = ("a", "b") if first else ()
            results = [
                HostReceipt("r1", "n1", "node", removed, ("c",), 10 * len(removed), 1.0),
                HostReceipt("r2", "n1", "node", (), ("c",), 0, 2.0),
            ]

        class Answers:
            async def results_async(self, *, return_exceptions: bool) -> list[Any]:
                return results

        return Answers()


class World:
    def __init__(self, folder: Path) -> None:
        self.registry = Registry(MemoryStore(), actor="operator:ADMIN.x")
        for tenant in (ACME, TenantId("globex")):
            self.registry.create_tenant(tenant)
        self.registry.register(ACME, tiny_weights(1.0), "tiny", TINY_SPECS)
        self.replicas = Replicas(self.registry)
        self.signer = Signer(folder / "erasure.key")
        fleet = Fleet(self.replicas, self.replicas.states)
        self.erasure = Erasure(self.registry, fleet, self.signer)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(erasure_module, "ASK_AGAIN_S", 0.0)
    made = World(tmp_path)
    # The file that the nodes keep, "c", is globex's too.
    monkeypatch.setattr(made.registry.eraser, "unnamed_tensors", lambda tenant, kept: set(kept) - {"c"})
    return made


async def test_everybody_is_asked_until_clean_in_the_right_order(world: World) -> None:
    record = await world.erasure.run(ACME, "operator:ADMIN.x")
    assert [name for name, _ in itertools.groupby(world.replicas.calls)] == ["fence", "erase", "erase_host"]
    assert world.replicas.calls.count("erase") == 4
    assert world.replicas.calls.count("erase_host") == 6, "twice, and again while a file is kept"
    assert world.replicas.resolved_at_fence, "the fence stands before the tombstone"
    assert [one["replica"] for one in record["replicas"]] == ["r1", "r2"]
    assert record["nodes"] == [
        {"node": "node", "node_id": "n1", "removed_tensors": ["a", "b"], "kept_tensors": ["c"],
         "overwritten_bytes": 20, "at": 2.0}
    ]  # fmt: skip
    assert len(record["store"]["removed_blobs"]) == 1
    assert record["tombstone_link"] == world.registry.last_entry(ACME).link
    assert read_records(world.registry.store, ACME) == [record]
    assert verify_record(record) is None
    assert verify_record(record, world.signer.public_key) is None
    assert verify_record(record, "00" * 32) == "it is signed with another key"


async def test_a_replica_that_gives_no_receipt_stops_it_and_a_rerun_finishes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure_module, "REPLICAS_TIMEOUT_S", 0.0)
    world.replicas.clean_after = 10**9
    with pytest.raises(FleetUnavailable, match="no receipt from r2"):
        await world.erasure.run(ACME, "me")
    with pytest.raises(NotFound):
        world.registry.head(ACME)
    with pytest.raises(NotFound):
        read_records(world.registry.store, ACME)
    world.replicas.running = ["r1"]  # it died: what it held is gone with it
    record = await world.erasure.run(ACME, "me")
    assert [one["replica"] for one in record["replicas"]] == ["r1"]
    assert len(record["store"]["removed_blobs"]) == 1
    assert (await world.erasure.run(ACME, "me"))["store"]["objects"] == 0, "once more finds nothing"


async def test_who_never_was_is_not_erased(world: World) -> None:
    with pytest.raises(NotFound):
        await world.erasure.run(TenantId("nobody"), "me")
    assert world.replicas.calls == []


async def test_an_erasure_goes_on_without_its_caller_and_is_joined_by_the_next(world: World) -> None:
    """It waits for a replica's receipt until the test lets it have one."""
    world.replicas.clean_after = 10**9
    erasures = Erasures(wait_s=0.01)
    first = await erasures.run(ACME, world.erasure, "first")
    assert isinstance(first, Erasing)
    second = await erasures.run(ACME, world.erasure, "second")
    assert second == Erasing(first.since, "waiting for the replicas' receipts")
    gone = asyncio.create_task(erasures.run(ACME, world.erasure, "gone"))
    await asyncio.sleep(0)
    gone.cancel()
    world.replicas.clean_after = 0
    erasures.wait_s = 60.0
    one, other = await asyncio.gather(*(erasures.run(ACME, world.erasure, "third") for _ in range(2)))
    assert isinstance(one, dict) and one == other
    assert one["asked_by"] == "first" and world.replicas.calls.count("fence") == 1
    assert verify_record(one) is None
    again = await erasures.run(ACME, world.erasure, "fourth")
    assert isinstance(again, dict) and again["id"] != one["id"], "its end was told: this is another"


async def test_how_an_erasure_failed_is_told_once_and_then_it_begins_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure_module, "REPLICAS_TIMEOUT_S", 0.0)
    world.replicas.clean_after = 10**9

    erasures = Erasures(wait_s=60)
    with pytest.raises(FleetUnavailable, match="no receipt from r2"):
        await erasures.run(ACME, world.erasure, "me")
    world.replicas.clean_after = 0
    assert isinstance(await erasures.run(ACME, world.erasure, "me"), dict)
    with pytest.raises(NotFound):
        await erasures.run(TenantId("nobody"), world.erasure, "me")


async def test_an_altered_record_is_found(world: World) -> None:
    record = await world.erasure.run(ACME, "me")
    for change in (
        lambda one: one.update(tenant="globex"),
        lambda one: one["store"].update(removed_blobs=[]),
        lambda one: one["replicas"].pop(),
        lambda one: one["signature"].update(value="AAAA"),
        lambda one: one["signature"].update(value="not base64!"),
        lambda one: one["signature"].update(public_key="zz"),
        lambda one: one.pop("signature"),
    ):
        altered = copy.deepcopy(record)
        change(altered)
        assert verify_record(altered) is not None


async def test_what_an_erasure_is_verified_by(world: World) -> None:
    registry, store = world.registry, world.registry.store
    record = await world.erasure.run(ACME, "me")
    key = world.signer.public_key

    def problems(tenant: TenantId = ACME, public_key: str | None = key) -> list[str]:
        return erasure_problems(registry, tenant, read_records(store, tenant), public_key)[0]

    assert problems() == [] and problems(public_key=None) == []
    assert problems(public_key="00" * 32) == [f"record {record['id']}: it is signed with another key"]
    # A good record of somebody else, of a tenant that is alive, or one that says nothing.
    globex = TenantId("globex")
    store.put(layout.erasure_key(globex, "1"), json.dumps(record).encode(), Create())
    assert [one.partition(": ")[2] for one in problems(globex)] == [
        "it is another tenant's", "its last change is tenant.created"
    ]  # fmt: skip
    for odd in ({}, {"kind": "flatshare.erasure", "schema_version": 1, "tenant": "acme"}, {"store": []}):
        store.put(layout.erasure_key(ACME, "2"), json.dumps(world.signer.sign(odd)).encode(), Overwrite())
        assert len(problems()) == 1, odd
    store.delete(layout.erasure_key(ACME, "2"))
    # Something of it that came back, or never went.
    (digest,) = record["store"]["removed_blobs"]
    store.put(layout.blob_key(digest), b"back", Create())
    assert problems() == [f"blob {digest[:12]} is still in the store"]
    store.put(layout.version_key(ACME, 1), b"{}", Create())
    assert len(problems()) == 1 and "versions/00000001.json is still" in problems()[0]


async def test_records_are_read_oldest_first_whatever_the_order_of_the_listing(world: World) -> None:
    made = [await world.erasure.run(ACME, f"try {number}") for number in range(3)]
    found = read_records(DisorderedStore(world.registry.store), ACME)
    assert [one["id"] for one in found] == sorted(one["id"] for one in made)


async def test_a_store_that_shows_no_versions_is_named_in_the_record(
    world: World, tmp_path: Path, s3_url: str
) -> None:
    good = await world.erasure.run(ACME, "me")
    assert good["store"]["versions_checked"] is True
    with odd_s3(s3_url, ODDITIES["no-versions"]) as (url, _):
        options = S3Options(endpoint_url=url)
        registry = Registry(S3Store(make_s3_client(options), "models", "no-versions", options))
        registry.create_tenant(ACME)
        registry.register(ACME, tiny_weights(1.0), "tiny", TINY_SPECS)
        world.replicas.registry = registry
        # The registry's own look at which tensors others have is not replaced here: the nodes keep none.
        record = await Erasure(registry, Fleet(Clean(world), world.replicas.states), world.signer).run(
            ACME, "me"
        )
        assert record["store"]["versions_checked"] is False
        assert verify_record(record) is None
        left = {meta.key.split("/")[0] for meta in registry.store.list("")}
        assert left == {"changes", "erasures", "tenants"}, "announcements name an id, for an hour"
        problems, notes = erasure_problems(registry, ACME, [record], None)
        assert problems == []
        assert any("versions" in note for note in notes)


class Clean:
    """Replicas whose node keeps nothing."""

    def __init__(self, world: World) -> None:
        self.inner = world.replicas

    def broadcast(self, method: str, *arguments: Any) -> Any:
        answers = self.inner.broadcast(method, *arguments)
        if method != "erase_host":
            return answers

        class Answers:
            async def results_async(self, *, return_exceptions: bool) -> list[Any]:
                return [HostReceipt("r1", "n1", "node", (), (), 0, 1.0)]

        return Answers()


async def test_a_file_that_is_kept_without_a_reason_stops_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        world.registry.eraser, "unnamed_tensors", lambda tenant, kept: set(kept), raising=True
    )
    with pytest.raises(FleetUnavailable, match="1 tensors of acme alone are still mapped on node"):
        await world.erasure.run(ACME, "me")
    with pytest.raises(NotFound):
        read_records(world.registry.store, ACME)


def test_many_that_make_the_signing_key_at_once_have_the_same(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / f"{number}.key"
        with ThreadPoolExecutor(8) as threads:
            made = list(threads.map(lambda _: Signer(path).public_key, range(8)))  # noqa: B023  # ends in this turn
        assert len(set(made)) == 1


def test_the_signing_key_is_private_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "erasure.key"
    first = Signer(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Signer(path).public_key == first.public_key
    path.chmod(0o644)
    with pytest.raises(ServeError, match="can be read by others"):
        Signer(path)
    path.chmod(0o600)
    path.write_text("junk")
    with pytest.raises(ServeError, match="does not hold a key"):
        Signer(path)
