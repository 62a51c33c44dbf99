"""One fault at a time under load: what clients see of it, when the platform is whole again, and what is lost.

A platform of its own on loopback, before a store that fails when told: moto's S3 behind a proxy of this
script. The host tier has room for some of the models, so some loads come from the store all the while.
Clients send checked requests; somebody writes through the control plane. Each fault is injected, and ends;
then the script waits until all replicas run, the edge answers, and every tenant gets its right answer.

``failed`` are requests without a 200, but for those that were ``refused``: a 503 or 429 that says when to
come back. ``lost`` are versions and acknowledged writes that the store does not have, and tenants that do
not answer. ``whole_after_s`` counts from the end of a fault that ends (a pause, a store that is down), else
from its beginning. ``met`` says how often something ran into a fault of the store or of the disk: 0 proves
nothing. ``left`` counts processes that were killed or stopped and are still there long after.

Ends with 1 when an answer was wrong or cut, something was lost, the platform did not become whole, or a
request failed under a fault that must cost none.

Steps of the clock are left out: the machine's clock is everybody's, Linux has no namespace for the wall clock,
and libfaketime 0.9.10 breaks Python's sleep where it leaves monotonic clocks alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import http.server
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import orjson
import psutil
import torch
import uvloop
from contenders import CONTENDERS, Capacity
from pool import s3_server
from safetensors.torch import save
from wedge import Wedge

from flatshare.api.schemas import MODEL_ID_HEADER
from flatshare.bench.client import Connection, NoAnswer, Target
from flatshare.bench.workload import encode_json
from flatshare.cli.context import credentials
from flatshare.cli.output import err, print_table
from flatshare.local.processes import wait_until_ended
from flatshare.local.state import PlatformState
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare_registry import Registry, TenantId
from flatshare_registry.errors import NotFound
from flatshare_registry.stores.open import open_store
from flatshare_registry.stores.s3 import S3Options
from flatshare_registry.testing.s3_server import CREDENTIALS

NETWORK = architecture("mnist-cnn")
STORE = "s3://models/chaos"
ROWS = 8
"""Different bodies of a tenant, of one image each."""

EXTRA_TENANTS = 6
"""Tenants beyond the slots of all replicas."""

HOST_MODELS = 7
"""Models for which the host tier has room: fewer than there are."""

SETTLE_S = 1.5
"""Of load before a fault, so that it hits requests under way."""

PAUSE_S = 0.02
"""Between a client's answer and its next request: a steady load, not a full one."""

RETRY_S = 0.1
"""The same after a request without an answer: who is refused a connection does not spin."""

PATIENCE_S = 3.0
"""After which a client sends its next request beside the one that has no answer yet: a few requests that hang
must not end the load."""

WRITE_EVERY_S = 0.5
CLIENT_TIMEOUT_S = 60.0
WHOLE_S = 150.0
"""Seconds within which the platform must be whole again."""

LEFT_S = 45.0
"""Seconds that a process has to end once all is whole without it: Serve gives a replica 20 s to go."""

SLOW_S = 2.0
"""What a slow store takes for a GET."""

REQUEST_TIMEOUT_S = 15
"""What a request may take here, and so a pass: half of what it is otherwise, so that a hanging one shows."""

DISK_BYTES = 24 * 1024**2
ROOM_BYTES = 3 * 1024**2
"""What the full disk still takes: less than a model, so that a file is begun and can't be ended."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=list(FAULTS), metavar="NAME", help=", ".join(FAULTS)
    )
    parser.add_argument("--seconds", type=float, default=5, help="length of a fault that ends by itself")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the rows as a document")
    arguments = parser.parse_args()
    capacity = Capacity(arguments.replicas, arguments.slots)
    os.environ |= CREDENTIALS
    with contextlib.ExitStack() as stack:
        os.environ["XDG_STATE_HOME"] = stack.enter_context(tempfile.TemporaryDirectory())
        behind = stack.enter_context(s3_server())
        store = stack.enter_context(FaultyS3.started(behind))
        models = Models(behind, capacity.replicas * capacity.slots + EXTRA_TENANTS)
        aside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wedge = Wedge(aside)
        wedge.register(models.registry)
        os.environ["FLATSHARE_REQUEST_TIMEOUT_S"] = str(REQUEST_TIMEOUT_S)
        os.environ["FLATSHARE_STORE"] = STORE
        os.environ["FLATSHARE_S3_ENDPOINT_URL"] = store.url
        os.environ["FLATSHARE_HOST_BYTES"] = str(HOST_MODELS * models.size_bytes)
        say("starting a platform")
        url = stack.enter_context(CONTENDERS["flatshare"].start(capacity))
        stage = stack.enter_context(Stage.opened(url, models, store, capacity, arguments, wedge))
        rows = run(stage, arguments.only or list(FAULTS))
    columns = ("requests", "failed", "refused", "wrong", "cut", "lost", "whole_after_s", "met", "left")
    print_table(
        "", ["fault", *(f"{name}#" for name in columns), "clients saw"],
        [(row["fault"], *(row[name] for name in columns), row["client_saw"]) for row in rows],
    )  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2))
    return 1 if any(map(is_bad, rows)) else 0


def run(stage: Stage, names: list[str]) -> list[dict[str, Any]]:
    """A row for each fault; ends early when the platform does not become whole: the rest proves nothing."""
    rows: list[dict[str, Any]] = []
    say("waiting until it is whole")
    if stage.wait_until_whole(frozenset()) is None:
        raise SystemExit(f"the platform was not whole before any fault: {stage.missing}")
    for name in names:
        say(f"{name} ...")
        row = one_fault(stage, name)
        rows.append(row)
        say(f"{name}: whole after {row['whole_after_s']} s; {row['client_saw']}")
        if row["whole_after_s"] is None:
            say(f"the platform is not whole ({stage.missing}); the other faults are left out")
            break
    return rows


def say(text: str) -> None:
    err.print(text, soft_wrap=True)


def one_fault(stage: Stage, name: str) -> dict[str, Any]:
    """Inject it, wait until all is whole, and count what clients saw meanwhile."""
    fault = FAULTS[name]
    time.sleep(SETTLE_S)  # a moment of load, not an event
    left = 0
    gone: list[psutil.Process] = []
    met_before = stage.met
    began = time.monotonic()
    try:
        with fault.inject(stage) as gone:
            ended = time.monotonic()
            whole_at = stage.wait_until_whole(frozenset(one.pid for one in gone))
            left = len(wait_until_ended(gone, LEFT_S))
    except Skipped as reason:
        return {
            "fault": name, "must_cost_nothing": fault.free, "skipped": str(reason), "requests": 0,
            "failed": 0, "refused": 0, "wrong": 0, "cut": 0, "lost": 0, "fault_s": 0.0, "whole_after_s": 0.0, "met": 0,
            "left": 0, "client_saw": f"skipped: {reason}",
        }  # fmt: skip
    finally:
        for process in gone:  # one that is stopped for good, or that its parent forgot, may still be there
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    until = whole_at if whole_at is not None else time.monotonic()
    seen = stage.traffic.between(began, until)
    counts = Counter(one.kind for one in seen)
    return {
        "fault": name,
        "must_cost_nothing": fault.free,
        "skipped": None,
        "requests": len(seen),
        **{kind: counts[kind] for kind in ("failed", "refused", "wrong", "cut")},
        "lost": stage.lost(),
        "fault_s": round(ended - began, 2),
        "whole_after_s": round(whole_at - ended, 2) if whole_at is not None else None,
        "met": stage.met - met_before,
        "left": left,
        "client_saw": in_words(seen),
        "codes": dict(Counter(one.code for one in seen)),
        "longest_s": round(max((one.ended - one.began for one in seen), default=0.0), 2),
        "writes": stage.writer.statuses_between(began, until),
    }


def in_words(seen: list[Seen]) -> str:
    """Counts of what came, the most frequent first; the longest wait; and for how long requests failed."""
    counts = Counter(one.code if one.status in (0, 200) else f"{one.code} ({one.status})" for one in seen)
    parts = [f"{count} {what.replace('_', ' ')}" for what, count in counts.most_common()]
    parts.append(f"longest {max((one.ended - one.began for one in seen), default=0.0):.1f} s")
    bad = [one.ended for one in seen if one.status != 200]
    if bad:
        parts.append(f"errors over {max(bad) - min(bad):.1f} s")
    return "; ".join(parts)


def is_bad(row: dict[str, Any]) -> bool:
    broken = row["wrong"] or row["lost"] or row["cut"] or row["whole_after_s"] is None
    return bool(broken or (row["must_cost_nothing"] and row["failed"]))


# -- faults


class Skipped(Exception):
    """This machine does not allow the fault."""


Inject = Callable[["Stage"], contextlib.AbstractContextManager[list[psutil.Process]]]
"""Entering injects it, and ends it if it ends; yields processes that are no part of the whole platform."""


@dataclass(frozen=True)
class Fault:
    """A fault; ``free`` when no request may fail."""

    inject: Inject
    free: bool = False


def killed(find: Callable[[Stage], list[psutil.Process]]) -> Inject:
    """SIGKILL of some processes, all at one moment."""

    @contextlib.contextmanager
    def inject(stage: Stage) -> Iterator[list[psutil.Process]]:
        victims = find(stage)
        if not victims:
            raise LookupError("the process to kill was not found")
        for process in victims:
            process.kill()
        yield victims

    return inject


@contextlib.contextmanager
def replica_paused(stage: Stage) -> Iterator[list[psutil.Process]]:
    """SIGSTOP, and SIGCONT after a while."""
    (victim,) = one_replica(stage)
    victim.send_signal(signal.SIGSTOP)
    try:
        stage.wait()
    finally:
        victim.send_signal(signal.SIGCONT)
    yield []


@contextlib.contextmanager
def replica_stopped(stage: Stage) -> Iterator[list[psutil.Process]]:
    """SIGSTOP for good: Serve's health check must find it, and put another one in its place."""
    (victim,) = one_replica(stage)
    victim.send_signal(signal.SIGSTOP)
    yield [victim]


def store_is(mode: str) -> Inject:
    """The store misbehaves for a while."""

    @contextlib.contextmanager
    def inject(stage: Stage) -> Iterator[list[psutil.Process]]:
        stage.store.mode = mode
        try:
            stage.wait()
        finally:
            stage.store.mode = "ok"
        yield []

    return inject


@contextlib.contextmanager
def host_disk_full(stage: Stage) -> Iterator[list[psutil.Process]]:
    """A small disk, nearly full, is put over the host tier's folder for a while."""
    folder, before = stage.host_folder(), stage.bypassed()
    with tempfile.TemporaryDirectory() as aside:
        # Filled aside, and put in place when it is full: a replica writes at once.
        mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", aside)
        try:
            (Path(aside) / "ballast").write_bytes(bytes(DISK_BYTES - ROOM_BYTES))
            mount("--bind", aside, str(folder))
        finally:
            unmount(aside)
    try:
        stage.wait()
        stage.met_disk += stage.bypassed() - before
    finally:
        unmount(str(folder))
    yield []


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"no mount: {done.stderr.strip()}")


def unmount(folder: str) -> None:
    """Lazily: a replica may map a file that is there."""
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def pass_wedged(stage: Stage) -> Iterator[list[psutil.Process]]:
    """One tenant's pass never ends: its thread can't be ended, so the process must be replaced."""
    stage.wedge.arm()
    asking = threading.Thread(target=stage.post, args=(stage.wedge.tenant, WEDGING), daemon=True)
    asking.start()
    while stage.wedge.is_armed:
        if not asking.is_alive():
            raise LookupError("the pass that was to hang was answered, or refused")
        time.sleep(0.02)  # a file that goes shows only by looking
    yield []


def one_replica(stage: Stage) -> list[psutil.Process]:
    return [psutil.Process(stage.fleet()["replicas"][0]["pid"])]


def role(name: str) -> Callable[[Stage], list[psutil.Process]]:
    return lambda stage: stage.processes()[name]


WEDGING = encode_json(np.zeros((1, 4), np.float32))

FAULTS: dict[str, Fault] = {
    "replica-killed": Fault(killed(one_replica), free=True),
    "edge-killed": Fault(killed(role("haproxy"))),
    "edge-master-killed": Fault(killed(lambda stage: stage.processes()["haproxy"][:1])),
    "edge-worker-killed": Fault(killed(lambda stage: stage.processes()["haproxy"][1:])),
    "controller-killed": Fault(killed(role("controller")), free=True),
    "control-killed": Fault(killed(role("control")), free=True),
    "replica-paused": Fault(replica_paused),
    "replica-stopped": Fault(replica_stopped),
    "store-down": Fault(store_is("down")),
    "store-slow": Fault(store_is("slow")),
    "store-throttling": Fault(store_is("throttling")),
    "store-corrupting": Fault(store_is("corrupting")),
    "host-disk-full": Fault(host_disk_full),
    "pass-wedged": Fault(pass_wedged),
}

TITLES = {
    "controller": "ray::ServeController",
    "control": "ray::ServeReplica:flatshare-control:ControlPlane",
}
"""How the command lines of Ray's actors begin."""


# -- the platform


class Models:
    """Tenants with weights of their own, what each rightly answers, and the registry behind the proxy."""

    def __init__(self, endpoint: str, tenants: int) -> None:
        self.registry = Registry(open_store(STORE, S3Options(endpoint_url=endpoint)), actor="chaos")
        self.tenants = [f"tenant-{number:02}" for number in range(tenants)]
        self.expected: dict[str, list[int]] = {}
        self.size_bytes = 0
        rows = np.random.default_rng(7).random((ROWS, *NETWORK.input.shape), dtype=np.float32)
        self.bodies = [encode_json(rows[index : index + 1]) for index in range(ROWS)]
        for seed, name in enumerate([*self.tenants, WRITTEN]):
            torch.manual_seed(seed)
            module = NETWORK.build()
            weights = save(dict(module.state_dict()))
            self.size_bytes = len(weights)
            self.registry.create_tenant(TenantId(name))
            self.registry.register(
                TenantId(name), weights, NETWORK.name, NETWORK.tensors,
                probe=lambda weights: probe_logits(NETWORK, weights),
            )  # fmt: skip
            with torch.inference_mode():
                self.expected[name] = module(torch.from_numpy(rows)).argmax(dim=1).tolist()


WRITTEN = "written"
"""The tenant to which writes go."""


class Stage:
    """A platform under load, and what can be seen of it."""

    def __init__(
        self,
        url: str,
        models: Models,
        store: FaultyS3,
        capacity: Capacity,
        arguments: argparse.Namespace,
        wedge: Wedge,
    ) -> None:
        self.wedge = wedge
        self.models = models
        self.store = store
        self.met_disk = 0
        self.missing = ""  # why it was not whole when it was looked at last
        self._seconds = arguments.seconds
        self._replicas = capacity.replicas
        self._url = url
        self._base = url.removesuffix("/predict")
        headers = credentials(url)
        state = PlatformState.load(urlsplit(url).port or 0)
        assert state is not None, "it was just started"
        self._up = psutil.Process(state.pid)
        self._client = httpx.Client(headers=headers, timeout=15)
        self.traffic = Traffic(url, models, headers, arguments.concurrency, arguments.seed)
        self.writer = Writer(self._base, headers)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, *arguments: Any) -> Iterator[Stage]:
        """With its load under way."""
        stage = cls(*arguments)
        with stage._client, stage.traffic.running(), stage.writer.running():
            yield stage

    def wait(self) -> None:
        """As long as a fault lasts that ends."""
        time.sleep(self._seconds)  # the length itself, not an event

    def fleet(self) -> dict[str, Any]:
        """The control plane's word on the replicas."""
        reply = self._client.get(f"{self._base}/admin/replicas")
        reply.raise_for_status()
        found: dict[str, Any] = reply.json()
        return found

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Of this platform only: what descends from its ``up``. HAProxy's master comes before its worker."""
        found: dict[str, list[psutil.Process]] = {"haproxy": [], "controller": [], "control": []}
        for process in self._up.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                title = " ".join(process.cmdline())
                if process.name() == "haproxy":
                    found["haproxy"].append(process)
                for name, start in TITLES.items():
                    if title.startswith(start):
                        found[name].append(process)
        masters = {process.pid for process in found["haproxy"]}
        found["haproxy"].sort(key=lambda process: process.ppid() in masters)
        return found

    def host_folder(self) -> Path:
        """Of the host tier, as a replica names it: below the folder that was set it has one for each boot."""
        return Path(self.fleet()["replicas"][0]["host"]["folder"]).parent

    @property
    def met(self) -> int:
        """How often something ran into a fault of the store or of the disk."""
        return self.store.met + self.met_disk

    def bypassed(self) -> int:
        """Tensors that replicas could not put into the host tier."""
        return sum(one["host"]["bypassed"] for one in self.fleet()["replicas"])

    def wait_until_whole(self, gone: frozenset[int]) -> float | None:
        """When it was whole again; None: not in time."""
        deadline = time.monotonic() + WHOLE_S
        while time.monotonic() < deadline:
            if not self.traffic.is_alive() or not self.writer.is_alive():
                raise RuntimeError("the load ended by itself")
            self.missing = self._what_is_missing(gone)
            if not self.missing:
                return time.monotonic()
            time.sleep(0.1)  # wholeness shows only by asking
        return None

    def _what_is_missing(self, gone: frozenset[int]) -> str:
        try:
            for name, processes in self.processes().items():
                if not {process.pid for process in processes} - gone:
                    return f"no {name}"
            fleet = self.fleet()
        except (httpx.HTTPError, ValueError, psutil.Error) as error:
            return f"replicas: {error!r}"
        running = [one["pid"] for one in fleet["replicas"] if one["state"] == "RUNNING"]
        if len(running) != self._replicas or fleet["not_answering"] or gone & set(running):
            return f"replicas {running} run of {self._replicas}; not answering: {fleet['not_answering']}"
        return next((f"{name} does not answer" for name in self.models.tenants if not self.answers(name)), "")

    def post(self, tenant: str, body: bytes) -> httpx.Response | None:
        """One request beside the load; None without an answer in time."""
        headers = {MODEL_ID_HEADER: tenant, "content-type": "application/json"}
        try:
            return self._client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError:
            return None

    def answers(self, tenant: str) -> bool:
        """Whether it gets its right answer now."""
        reply = self.post(tenant, self.models.bodies[0])
        if reply is None:
            return False
        return reply.status_code == 200 and reply.json()["predicted_label"] == [
            self.models.expected[tenant][0]
        ]

    def lost(self) -> int:
        """Versions and acknowledged writes that the store behind has not, and tenants that do not answer."""
        lost = 0
        for name in self.models.tenants:
            try:
                kept = [one.version for one in self.models.registry.list_versions(TenantId(name))] == [1]
            except NotFound:
                kept = False
            lost += not (kept and self.answers(name))
        kept_aliases = self.models.registry.head(TenantId(WRITTEN)).aliases
        return lost + len(self.writer.acknowledged.copy() - set(kept_aliases))


# -- load


@dataclass(frozen=True, slots=True)
class Seen:
    """One request's fate; ``kind`` is a column of the table, or ``ok``."""

    began: float
    ended: float
    status: int
    code: str
    kind: str


class Traffic(threading.Thread):
    """Clients that send one request after the other, each with an answer that is known in advance.

    Not ``flatshare.bench.load``: that one keeps no Retry-After, and sends again at once where nobody listens.
    """

    def __init__(
        self, url: str, models: Models, headers: dict[str, str], concurrency: int, seed: int
    ) -> None:
        super().__init__(name="traffic", daemon=True)
        self._target = Target.of(url)
        self._requests = []
        for name in models.tenants:
            shown = {**headers, MODEL_ID_HEADER: name, "content-type": "application/json"}
            self._requests += [
                (self._target.request(shown, body), [label])
                for body, label in zip(models.bodies, models.expected[name], strict=True)
            ]
        self._concurrency = concurrency
        self._dice = random.Random(seed)
        self._stopped = threading.Event()
        self._seen: list[Seen] = []
        self._numbers = itertools.count()
        self._under_way: dict[int, float] = {}
        self._tasks: set[asyncio.Task[Seen]] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """From here to the end of the block."""
        self.start()
        try:
            yield
        finally:
            self._stopped.set()
            self.join()

    def between(self, began: float, ended: float) -> list[Seen]:
        """Requests that were under way at a time between these; waits for the last of them."""
        while any(at <= ended for at in list(self._under_way.values())):
            time.sleep(0.05)  # each has its time-out; the clients run in another thread
        return [one for one in self._seen if one.ended >= began and one.began <= ended]

    def run(self) -> None:
        """Until told to stop."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*[self._client() for _ in range(self._concurrency)])
        await asyncio.gather(*self._tasks)

    async def _client(self) -> None:
        connection = Connection(self._target)
        while not self._stopped.is_set():
            task = asyncio.create_task(self._send(connection, *self._dice.choice(self._requests)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
            if not done:
                connection = Connection(self._target)  # the other one goes on waiting
            await asyncio.sleep(PAUSE_S if not done or task.result().status else RETRY_S)
        connection.close()

    async def _send(self, connection: Connection, request: bytes, expected: list[int]) -> Seen:
        began = time.monotonic()
        number = next(self._numbers)
        self._under_way[number] = began
        try:
            seen = await self._answered(connection, request, expected, began)
            self._seen.append(seen)
            return seen
        finally:
            del self._under_way[number]

    async def _answered(
        self, connection: Connection, request: bytes, expected: list[int], began: float
    ) -> Seen:
        try:
            reply = await connection.post(request, CLIENT_TIMEOUT_S)
        except NoAnswer as error:
            code, kind = ("cut_answer", "cut") if error.begun else ("no_answer", "failed")
            return Seen(began, time.monotonic(), 0, code, kind)
        try:
            answer = orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            answer = {}
        if reply.status == 200:
            code, kind = ("ok", "ok") if answer.get("predicted_label") == expected else ("wrong", "wrong")
        else:
            code = answer.get("error", {}).get("code", f"http_{reply.status}")
            honest = reply.status in (429, 503) and "retry-after" in reply.headers
            kind = "refused" if honest else "failed"
        return Seen(began, time.monotonic(), reply.status, code, kind)


class Writer(threading.Thread):
    """Sets one alias after the other through the control plane, and remembers what was acknowledged."""

    def __init__(self, base: str, headers: dict[str, str]) -> None:
        super().__init__(name="writer", daemon=True)
        self._url = f"{base}/admin/tenants/{WRITTEN}/aliases"
        self._client = httpx.Client(headers=headers, timeout=15)
        self._stopped = threading.Event()
        self._ended: list[tuple[float, int]] = []
        self.acknowledged: set[str] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """From here to the end of the block."""
        self.start()
        try:
            yield
        finally:
            self._stopped.set()
            self.join()

    def statuses_between(self, began: float, ended: float) -> dict[int, int]:
        """How many writes ended with which status; 0 for no answer."""
        return dict(Counter(status for at, status in list(self._ended) if began <= at <= ended))

    def run(self) -> None:
        """Until told to stop."""
        with self._client:
            for number in itertools.count():
                if self._stopped.wait(WRITE_EVERY_S):
                    return
                name = f"write-{number}"
                try:
                    status = self._client.put(f"{self._url}/{name}", json={"version": 1}).status_code
                except httpx.HTTPError:
                    status = 0
                self._ended.append((time.monotonic(), status))
                if status == 200:
                    self.acknowledged.add(name)


# -- the store


class FaultyS3(http.server.ThreadingHTTPServer):
    """Hands requests on to an S3, but for what its mode says.

    ``down`` closes connections without an answer, ``slow`` takes its time for a GET, ``throttling`` answers
    SlowDown, ``corrupting`` turns a bit in the middle of weights.
    """

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "ok"
        self.met = 0
        parts = urlsplit(behind)
        self.behind = (str(parts.hostname), int(parts.port or 80))
        self.url = f"http://127.0.0.1:{self.server_port}"

    @classmethod
    @contextlib.contextmanager
    def started(cls, behind: str) -> Iterator[FaultyS3]:
        """Serve in threads of this process."""
        with cls(behind) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True, name="faulty-s3")
            thread.start()
            try:
                yield server
            finally:
                server.shutdown()
                thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of ours to report."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One client's connection, with one of its own to the S3 behind."""

    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def setup(self) -> None:
        super().setup()
        self._behind = http.client.HTTPConnection(*self.server.behind, timeout=30)

    def finish(self) -> None:
        self._behind.close()
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _hand_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        mode = self.server.mode
        if mode == "down":
            self.server.met += 1
            self.close_connection = True
            return
        if mode == "throttling":
            self.server.met += 1
            self._answer(503, [("content-type", "application/xml")], SLOW_DOWN)
            return
        if mode == "slow" and self.command == "GET":
            self.server.met += 1
            time.sleep(SLOW_S)  # that is the fault
        own = {"connection", "expect", "transfer-encoding"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
        self._behind.request(self.command, self.path, body or None, headers)
        reply = self._behind.getresponse()
        data = reply.read()
        if mode == "corrupting" and self.command == "GET" and "/blobs/" in self.path and data:
            self.server.met += 1
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self._answer(reply.status, reply.getheaders(), data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _hand_on  # noqa: N815  # http.server's names

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        own = {"connection", "transfer-encoding"} | (set() if self.command == "HEAD" else {"content-length"})
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
)


if __name__ == "__main__":
    sys.exit(main())
