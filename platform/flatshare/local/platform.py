"""Start everything on this machine in order, and end it in the reverse order, whatever happens.

Imports ray, so it must be imported only after ``pool.environment.prepare``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import ray
from ray import serve

from flatshare.api.identity import OperatorKeys
from flatshare.control.deployment import CONTROL_APP, CONTROL_PREFIX, control_application
from flatshare.edge.configuration import EdgeOptions
from flatshare.edge.process import HaproxyProcess
from flatshare.edge.supervisor import EdgeSupervisor, EdgeTargets
from flatshare.errors import LocalError
from flatshare.local.cluster_guard import check_cluster
from flatshare.local.state import PlatformState
from flatshare.pool.controller import read_details
from flatshare.pool.deployment import POOL_APP, pool_application
from flatshare.pool.details import Target, app_status, targets
from flatshare.settings import LOOPBACK_HOSTS, Settings
from flatshare_registry.errors import Unavailable

__all__ = ["check_ports", "running_edge", "running_platform"]

logger = logging.getLogger("flatshare.local")

OBJECT_STORE_BYTES: Final = 128 * 1024**2
"""Ray's object store on a cluster that we start: nothing large goes through it."""

READY_TIMEOUT_S: Final = 60.0

Report = Callable[[str], None]
"""Called with what is being done now."""


def check_ports(settings: Settings) -> None:
    """See that our ports are free, before anything is started.

    Raises
    ------
    LocalError
        One is taken; says which, and what to do.
    """
    wanted = {"port": settings.port}
    if settings.edge == "haproxy":
        wanted["serve_port"] = settings.serve_port
    for name, port in wanted.items():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                option = name.replace("_", "-")
                raise LocalError(
                    f"port {port} is taken ({error.strerror}); end what listens there, "
                    f"or choose another with --{option}"
                ) from error


@contextlib.contextmanager
def running_platform(
    settings: Settings,
    operators: OperatorKeys | None,
    environment: dict[str, str],
    ray_address: str,
    *,
    log: str,
    report: Report,
) -> Iterator[tuple[PlatformState, Callable[[threading.Event], None]]]:
    """Everything up inside the block, everything down after it.

    Parameters
    ----------
    operators
        Who may do everything; None when authentication is off.
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
    """
    with contextlib.ExitStack() as stack:
        report("starting Ray")
        address, own = stack.enter_context(_ray(ray_address, environment))
        check_cluster(address, settings)
        report(f"starting {settings.replicas} replicas and the control plane")
        stack.enter_context(_applications(settings, operators, environment, keep_cluster=not own))
        watch = _watch_nothing
        if settings.edge == "haproxy":
            report("starting the edge")
            watch = stack.enter_context(_edge(settings)).run
        url = _url(settings)
        report("waiting for the first answers")
        _wait_until_answers(url)
        state = PlatformState(
            pid=os.getpid(),
            started_at=psutil.Process().create_time(),
            url=url,
            port=settings.port,
            edge=settings.edge,
            store=settings.store,
            replicas=settings.replicas,
            slots=settings.slots,
            log=log,
            ray_address=address,
            family=tuple(
                (child.pid, child.create_time()) for child in psutil.Process().children(recursive=True)
            ),
        )
        state.save()
        stack.callback(state.remove)
        yield state, watch
        report("stopping")


@contextlib.contextmanager
def _ray(wanted: str, environment: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """Connect to a cluster, or start one that ends with the block; its address, and whether it is ours."""
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "namespace": "flatshare",
    }
    variables = {"env_vars": environment}
    started = False
    context: Any = None
    if wanted != "local":
        try:
            context = ray.init(address=wanted, runtime_env=variables, **options)
        except ConnectionError as error:
            if wanted != "auto":
                raise LocalError(f"there is no Ray cluster at {wanted}") from error
    if not ray.is_initialized():
        started = True
        cores = os.cpu_count() or 1
        context = ray.init(
            address="local",
            # A count for scheduling: replicas ask for one each, whatever the machine has.
            num_cpus=max(cores, 64),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    children = psutil.Process().children(recursive=True) if started else []
    try:
        yield str(context.address_info["gcs_address"]), started
    finally:
        ray.shutdown()
        _end_leftovers(children)


def _end_leftovers(children: list[psutil.Process]) -> None:
    """Ray's own processes have been told to end; wait for that, and kill what does not."""
    _, alive = psutil.wait_procs(children, timeout=10)
    for process in alive:
        logger.warning("killing %s (%d), which outlived Ray", process.name(), process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


@contextlib.contextmanager
def running_edge(settings: Settings, ray_address: str) -> Iterator[EdgeSupervisor]:
    """Only the edge, for a pool that runs on an existing cluster.

    Raises
    ------
    LocalError
        There is no such cluster, HAProxy does not start, or it would open a pool without keys to others.
    """
    try:
        ray.init(address=ray_address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise LocalError(
            f"there is no Ray cluster at {ray_address}; start a platform with: flatshare up"
        ) from error
    try:
        check_cluster(str(ray.get_runtime_context().gcs_address), settings)
        if settings.host not in LOOPBACK_HOSTS:
            demand_keys(edge_targets())  # the pool was started elsewhere, with settings of its own
        with _edge(settings) as supervisor:
            yield supervisor
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _applications(
    settings: Settings, operators: OperatorKeys | None, environment: dict[str, str], *, keep_cluster: bool
) -> Iterator[None]:
    """Both Serve applications, running."""
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
            "host": "127.0.0.1",
            "port": settings.port if settings.edge == "serve" else settings.serve_port,
        },
    )
    try:
        _deploy(pool_application(settings, operators, environment), POOL_APP, "/")
        _deploy(control_application(settings, operators, environment), CONTROL_APP, CONTROL_PREFIX)
        yield
    finally:
        if keep_cluster:  # else everything ends with the cluster, and nobody need wait for its draining
            serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's


def _deploy(application: serve.Application, name: str, prefix: str) -> None:
    try:
        serve.run(application, name=name, route_prefix=prefix)
    except RuntimeError as error:
        status, message = app_status(read_details(), name)
        reason = message.strip().splitlines()[-1] if message.strip() else str(error)
        raise LocalError(f"{name} did not start ({status}): {reason}") from error


@contextlib.contextmanager
def _edge(settings: Settings) -> Iterator[EdgeSupervisor]:
    folder = Path(tempfile.mkdtemp(prefix="flatshare-edge-"))
    process = HaproxyProcess(folder)
    supervisor = EdgeSupervisor(process, edge_options(settings, process.admin_socket), edge_targets)
    try:
        supervisor.start()
        yield supervisor
    finally:
        supervisor.stop()
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
            if httpx.get(f"http://{target.ip}:{target.port}/admin/tenants", timeout=5).status_code == 401:
                return
    raise LocalError(
        "the pool does not ask for keys (auth=off), or its control plane does not answer: "
        "the edge may listen on loopback only"
    )


CORES_PER_EDGE_THREAD: Final = 8
"""Cores whose replicas one thread of HAProxy serves: each core's do up to 1,000 requests/s."""


def edge_options(settings: Settings, admin_socket: Path) -> EdgeOptions:
    """The part of the settings that the edge needs."""
    return EdgeOptions(
        host=settings.host,
        port=settings.port,
        socket=admin_socket,
        fallback_port=settings.serve_port,
        max_body_bytes=settings.max_body_bytes,
        retry_body_bytes=settings.retry_body_bytes,
        request_timeout_s=settings.request_timeout_s,
        tls_cert=settings.tls_cert,
        max_connections_per_address=settings.max_connections_per_address,
        threads=max((os.cpu_count() or 1) // CORES_PER_EDGE_THREAD, 1),
    )


def edge_targets() -> EdgeTargets:
    """Where both applications listen now, as seen from this node."""
    details = read_details()
    own_ip = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray's

    def near(found: list[Target]) -> tuple[Target, ...]:
        # Replicas of this node listen on loopback, although Serve names the node's address.
        return tuple(Target(one.name, "127.0.0.1", one.port) if one.ip == own_ip else one for one in found)

    return EdgeTargets(near(targets(details, POOL_APP)), near(targets(details, CONTROL_APP)))


def _watch_nothing(stop: threading.Event) -> None:
    """Without HAProxy there is nothing to keep in step."""
    stop.wait()


def _url(settings: Settings) -> str:
    """Where clients on this machine reach the edge."""
    everywhere = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104  # names only
    host = everywhere.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{settings.port}"


def _wait_until_answers(url: str) -> None:
    """Until both planes answer through the edge."""
    # It is our own edge on this machine; its certificate names the machine as clients know it.
    transport = httpx.HTTPTransport(retries=0, verify=False)
    deadline = threading.Event()
    timer = threading.Timer(READY_TIMEOUT_S, deadline.set)
    timer.daemon = True
    timer.start()
    last = "no answer"
    with httpx.Client(transport=transport, timeout=5) as client:
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
