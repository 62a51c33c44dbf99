"""Start everything on this machine in order, and end it in the reverse order, whatever happens.

Imports ray, so it must be imported only after ``pool.environment.prepare``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import httpx
import ray
from ray import serve

from flatshare.access_log import log_target
from flatshare.api.identity import OperatorKeys
from flatshare.control.decided import Routes
from flatshare.control.deployment import CONTROL_APP, CONTROL_PREFIX, control_application
from flatshare.edge.options import EdgeOptions
from flatshare.edge.process import HaproxyProcess
from flatshare.edge.servers import Server
from flatshare.edge.spans import EdgeSpans
from flatshare.edge.supervisor import EdgeSupervisor, EdgeTargets
from flatshare.errors import LocalError
from flatshare.local.checks import affordable_connections
from flatshare.local.cluster import joined_cluster, ray_cluster
from flatshare.local.cluster_guard import check_cluster
from flatshare.local.processes import descendants
from flatshare.local.state import PlatformState
from flatshare.pool.controller import read_details
from flatshare.pool.details import app_status, replica_states, targets
from flatshare.pool.doors import Doors, ask_replicas
from flatshare.pool.gpus import check_gpus
from flatshare.pool.handle import POOL_APP, POOL_DEPLOYMENT, control_handle
from flatshare.pool.kept import Deployed, forget, remember_deployed
from flatshare.pool.task_names import TASKS_APP
from flatshare.settings import LOOPBACK_HOSTS, Settings
from flatshare.telemetry.exporting import SpanWriter
from flatshare_registry.errors import Unavailable

__all__ = ["Report", "deploy", "running_edge", "running_platform"]

logger = logging.getLogger("flatshare.local")

READY_TIMEOUT_S: Final = 60.0
ASK_S: Final = 1.0

Report = Callable[[str], None]
"""Called with what is being done now."""


@contextlib.contextmanager
def running_platform(
    settings: Settings,
    state: PlatformState,
    operators: OperatorKeys | None,
    environment: dict[str, str],
    ray_address: str,
    report: Report,
) -> Iterator[tuple[PlatformState, Callable[[threading.Event], None]]]:
    """Everything up inside the block, everything down after it.

    Parameters
    ----------
    state
        What was written down when it was about to start; written again as more is known.
    operators
        Digests of admins' and viewers' keys; None when authentication is off.
    environment
        What ``pool.environment.prepare`` returned.
    ray_address
        ``auto``: a running cluster, else one of our own. ``local``: always one of our own. Else an address.

    Yields
    ------
    state, watch
        What to tell people; and a function that keeps the edge in step until an event is set.

    Raises
    ------
    LocalError
        Something did not start; what had started is down again.
    SettingsError
        The cluster has not enough GPUs.
    """
    with contextlib.ExitStack() as stack:
        report("starting Ray")
        address, own = stack.enter_context(ray_cluster(ray_address, environment))
        state = replace(state, ray_address=address, family=descendants())
        state.save()
        check_cluster(address, settings)
        check_gpus(settings.most_replicas, settings.gpus_per_replica)
        report(f"starting {settings.replicas} replicas and the control plane")
        stack.enter_context(_applications(settings, operators, environment, keep_cluster=not own))
        watch: Callable[[threading.Event], None] = _watch_nothing
        if settings.edge == "haproxy":
            report("starting the edge")
            watch = stack.enter_context(_edge(settings)).run
        report("waiting for the first answers")
        _watch_until_answers(state.url, watch)
        state = replace(state, phase="running", family=descendants())
        state.save()
        yield state, watch
        report("stopping")


@contextlib.contextmanager
def running_edge(settings: Settings, ray_address: str) -> Iterator[EdgeSupervisor]:
    """Only the edge, for a pool that runs on an existing cluster.

    Raises
    ------
    LocalError
        There is no such cluster, HAProxy does not start, or it would open a pool without keys to others.
    """
    with joined_cluster(ray_address) as address:
        check_cluster(address, settings)
        if settings.host not in LOOPBACK_HOSTS:
            demand_keys(
                edge_targets(Doors(ask_replicas))
            )  # the pool was started elsewhere, with settings of its own
        with _edge(settings) as supervisor:
            yield supervisor


@contextlib.contextmanager
def _applications(
    settings: Settings, operators: OperatorKeys | None, environment: dict[str, str], *, keep_cluster: bool
) -> Iterator[None]:
    """The Serve applications, running: pool, control plane, and where there are some, steps and consumer."""
    try:
        details = read_details()
    except Unavailable:
        pass  # Serve does not run yet: as it should be
    else:
        what = "flatshare" if app_status(details, POOL_APP)[0] != "NOT_STARTED" else "Ray Serve"
        # Serve reads its flags (direct ingress, gRPC handles) when it starts, so we must start it.
        raise LocalError(f"{what} already runs on this Ray cluster; shut it down, or use --ray local")
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": "127.0.0.1" if settings.nodes == "one" else "0.0.0.0",  # noqa: S104  # on purpose
            "port": settings.port if settings.edge == "serve" else settings.serve_port,
        },
    )
    # The pool's classes, and torch with them: a deployment needs them, an edge by itself does not.
    from flatshare.pipelines.deployment import step_application
    from flatshare.pool.consumer import consumer_application
    from flatshare.pool.deployment import pool_application
    from flatshare.pool.steps import step_app

    try:
        for name, step in settings.pipelines.items():
            deploy(step_application(name, step, environment, settings), step_app(name), None)
        # First: replicas and the control plane look there for what was changed in place.
        forget()
        remember_deployed(Deployed(settings, operators, environment))
        deploy(pool_application(settings, operators, environment), POOL_APP, "/", scaled=True)
        if settings.tasks != "off":
            deploy(consumer_application(settings, environment), TASKS_APP, None, scaled=True)
        deploy(control_application(settings, operators, environment), CONTROL_APP, CONTROL_PREFIX)
        yield
    finally:
        if keep_cluster:  # else everything ends with the cluster, and nobody need wait for its draining
            serve.shutdown()  # type: ignore[no-untyped-call]  # Ray gives it no types


def deploy(application: serve.Application, name: str, prefix: str | None, *, scaled: bool = False) -> None:
    """Deploy and wait until it runs.

    Parameters
    ----------
    scaled
        Its number of replicas is changed from outside: by the control plane's keeper.
    """
    try:
        serve.run(application, name=name, route_prefix=prefix, external_scaler_enabled=scaled)
    except RuntimeError as error:
        status, message = app_status(read_details(), name)
        reason = message.strip().splitlines()[-1] if message.strip() else str(error)
        raise LocalError(f"{name} did not start ({status}): {reason}") from error


@contextlib.contextmanager
def _edge(settings: Settings) -> Iterator[EdgeSupervisor]:
    folder = Path(tempfile.mkdtemp(prefix="flatshare-edge-"))
    process = HaproxyProcess(folder, access_log=log_target(settings.access_log)[1])
    doors = Doors(ask_replicas)
    decided = Decided()

    spans = None
    if settings.traces != "off":
        writer = SpanWriter(settings.traces, "flatshare.edge", os.uname().nodename)
        spans = EdgeSpans(folder / "spans.sock", writer)
    supervisor = EdgeSupervisor(
        process,
        edge_options(settings, process.admin_socket, spans.path if spans is not None else None),
        lambda: edge_targets(doors, decided.routes()),
        decided.wake,
    )
    try:
        supervisor.start()
        yield supervisor
    finally:
        supervisor.stop()
        if spans is not None:
            spans.close()
        shutil.rmtree(folder, ignore_errors=True)


def demand_keys(found: EdgeTargets) -> None:
    """Return if a pool asks callers for keys; one that doesn't may be reached on loopback only.

    Raises
    ------
    LocalError
        It lets everybody in, or does not say.
    """
    for target in found.control:
        with contextlib.suppress(httpx.HTTPError):
            url = f"http://{target.host}:{target.port}/admin/tenants"
            if httpx.get(url, timeout=5, trust_env=False).status_code == 401:
                return
    raise LocalError(
        "the pool does not ask for keys (auth=off), or its control plane does not answer: "
        "the edge may listen on loopback only"
    )


CORES_PER_EDGE_THREAD: Final = 8
"""Cores whose replicas one HAProxy thread serves: the replicas of one core do up to 1,000 requests/s."""


def edge_options(settings: Settings, admin_socket: Path, spans: Path | None = None) -> EdgeOptions:
    """The part of the settings that the edge needs.

    Parameters
    ----------
    spans
        Socket that receives lines of sampled requests; None where nothing is traced.
    """
    return EdgeOptions(
        host=settings.host,
        port=settings.port,
        socket=admin_socket,
        fallback_port=settings.serve_port,
        max_body_bytes=settings.max_body_bytes,
        retry_body_bytes=settings.retry_body_bytes,
        request_timeout_s=settings.request_timeout_s,
        tls_cert=str(Path(settings.tls_cert).absolute()) if settings.tls_cert else "",
        max_connections_per_address=settings.max_connections_per_address,
        max_connections=affordable_connections(settings.most_replicas),
        trusted_proxies=settings.proxy_networks(),
        access_log=log_target(settings.access_log)[0],
        spans=spans,
        trace_ratio=settings.trace_ratio,
        metrics_port=settings.edge_metrics_port,
        threads=max((os.cpu_count() or 1) // CORES_PER_EDGE_THREAD, 1),
        tasks=settings.tasks != "off",
        max_task_bytes=settings.tasks_max_body_bytes,
    )


def edge_targets(doors: Doors, routes: Routes | None = None) -> EdgeTargets:
    """Where both applications listen now, as seen from this node."""
    details = read_details()
    own_ip = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray gives it no types
    routes = routes or Routes({})
    pool = doors.of(replica_states(details, POOL_APP, POOL_DEPLOYMENT), routes.draining)
    return EdgeTargets(
        tuple(Server(door.place, door.host, door.port) for door in pool),
        tuple(
            # Replicas of this node listen on loopback, although Serve names the node's address.
            Server(number, "127.0.0.1" if one.ip == own_ip else one.ip, one.port)
            for number, one in enumerate(targets(details, CONTROL_APP))
        ),
        routes.models,
    )


class Decided:
    """The control plane's decisions, for an edge: read at each look, and kept while nobody answers."""

    def __init__(self) -> None:
        self._routes = Routes({})

    def routes(self) -> Routes:
        """What does not go by the ring alone. Blocks, for a second at most."""
        try:
            self._routes = control_handle().routes.remote().result(timeout_s=ASK_S)
        except Exception as error:  # ray raises a dozen kinds while the control plane comes back
            logger.warning("nobody says which models have copies: %s", type(error).__name__)
        return self._routes

    def wake(self, waiting: int) -> None:
        """Tell it that so many requests wait for a first replica. Blocks, for a second at most."""
        try:
            control_handle().wake.remote(waiting).result(timeout_s=ASK_S)
        except Exception as error:
            logger.warning("the control plane was not told of waiting requests: %s", type(error).__name__)


def _watch_nothing(stop: threading.Event) -> None:
    """Without HAProxy there is nothing to keep in step."""
    stop.wait()


def _watch_until_answers(url: str, watch: Callable[[threading.Event], None]) -> None:
    """Keep the edge in step until both planes answer: the first request must wake a pool that is at zero.

    Raises
    ------
    LocalError
        They do not answer in time.
    """
    answered = threading.Event()
    failures: list[LocalError] = []

    def ask() -> None:
        try:
            _wait_until_answers(url)
        except LocalError as error:
            failures.append(error)
        finally:
            answered.set()

    threading.Thread(target=ask, daemon=True, name="ask for answers").start()
    watch(answered)  # here: HAProxy ends with the thread that started it
    if failures:
        raise failures[0]


def _wait_until_answers(url: str) -> None:
    """Until both planes answer through the edge."""
    # It is our own edge on this machine; its certificate names the machine as clients know it.
    transport = httpx.HTTPTransport(retries=0, verify=False)
    deadline = threading.Event()
    timer = threading.Timer(READY_TIMEOUT_S, deadline.set)
    timer.daemon = True
    timer.start()
    last = "no answer"
    with httpx.Client(transport=transport, timeout=5, trust_env=False) as client:
        for path in ("/openapi.json", f"{CONTROL_PREFIX}/openapi.json"):
            while True:
                try:
                    reply = client.get(url + path)
                    if reply.status_code == 200:
                        break
                    last = f"{reply.status_code} {reply.text[:200]}"
                except httpx.HTTPError as error:
                    last = str(error) or type(error).__name__
                # Nothing to await here: readiness shows only by asking.
                if deadline.wait(0.1):
                    raise LocalError(f"{url}{path} did not answer within {READY_TIMEOUT_S:g} s: {last}")
    timer.cancel()
