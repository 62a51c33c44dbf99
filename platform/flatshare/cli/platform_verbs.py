"""Verbs that run a platform on this machine: up, down, status, edge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import typer

from flatshare.cli.context import StoreOption, call, need_serve_extra
from flatshare.cli.output import AsJson, err, out, print_json, print_table
from flatshare.errors import LocalError, ServeError, SettingsError
from flatshare.settings import Settings, load_settings
from flatshare_registry.errors import RegistryError

STOP_TIMEOUT_S: Final = 60.0
READY_FD_VARIABLE: Final = "FLATSHARE_READY_FD"
"""Set by ``up --detach`` for its child: where to write one JSON line when everything answers."""

PortOption = Annotated[int | None, typer.Option(help="Port of the edge.", show_default="8000")]
RayOption = Annotated[
    str,
    typer.Option(
        "--ray",
        help="auto: a running Ray cluster, else one of our own. local: always our own. Or an address.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for function in (up, down, status, edge):
        app.command(rich_help_panel="This machine")(function)


def up(
    store: StoreOption = None,
    replicas: Annotated[int | None, typer.Option(show_default="2", help="Replicas in the pool.")] = None,
    slots: Annotated[
        int | None, typer.Option(show_default="10", help="Models that one replica holds.")
    ] = None,
    device: Annotated[str | None, typer.Option(show_default="auto", help="auto, cpu or cuda.")] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option(show_default="0", help="GPUs reserved for one replica; fractions work.")
    ] = None,
    max_ongoing_requests: Annotated[int | None, typer.Option(show_default="64")] = None,
    max_queued_requests: Annotated[int | None, typer.Option(show_default="256")] = None,
    edge_kind: Annotated[
        str | None, typer.Option("--edge", show_default="haproxy", help="haproxy, or serve (slower).")
    ] = None,
    host: Annotated[
        str | None, typer.Option(show_default="127.0.0.1", help="Address that the edge listens on.")
    ] = None,
    auth: Annotated[
        str | None, typer.Option(show_default="on", help="off lets everybody in; only on loopback.")
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(help="PEM file of certificate and key: TLS ends at the edge.")
    ] = None,
    port: PortOption = None,
    serve_port: Annotated[
        int | None, typer.Option(show_default="8500", help="Port of Ray Serve's own proxy, on loopback.")
    ] = None,
    ray_address: RayOption = "auto",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when everything answers.")] = False,
) -> None:
    """Start everything on this machine: Ray when none is running, the pool, the control plane, the edge."""
    need_serve_extra()
    settings = load_settings(
        store=store,
        replicas=replicas,
        slots=slots,
        device=device,
        gpus_per_replica=gpus_per_replica,
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        edge=edge_kind,
        host=host,
        auth=auth,
        tls_cert=tls_cert,
        port=port,
        serve_port=serve_port,
    )
    if not settings.store:
        raise SettingsError("no store: set FLATSHARE_STORE or --store to s3://bucket/prefix or file:///path")
    if settings.store.startswith("memory:"):
        raise SettingsError("memory:// is one process's own; replicas are others. Use s3:// or file://")
    settings.open_store()  # a store URL that can't be opened is refused before anything starts

    from flatshare.local.state import PlatformState

    running = PlatformState.read(settings.port)
    if running is not None and running.process() is None:
        running.end_leftovers()
    elif running is not None:
        raise LocalError(
            f"flatshare already runs on port {settings.port} (pid {running.pid}); flatshare down ends it"
        )
    if detach:
        _up_detached(settings)
    else:
        _up_here(settings, ray_address)


def _up_here(settings: Settings, ray_address: str) -> None:
    """Run until told to stop; everything ends with this process."""
    from flatshare.local.ray_token import cluster_token_file
    from flatshare.pool.environment import prepare

    environment = prepare(settings.edge, cluster_token_file(ray_address))

    # Only now: ray reads its flags when it is imported.
    from flatshare.local.operators import operators_of
    from flatshare.local.platform import check_ports, running_platform

    settings, operators = operators_of(settings)
    check_ports(settings)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            return  # already stopping: a second Ctrl-C must not leave half of it behind
        stop.set()
        raise KeyboardInterrupt

    _on_stop_signals(on_signal)
    log = os.environ.get("FLATSHARE_UP_LOG", "")
    try:
        with (
            err.status("starting ...") as spinner,
            running_platform(
                settings,
                operators,
                environment,
                ray_address,
                log=log,
                report=lambda text: spinner.update(f"{text} ..."),
            ) as (state, watch),
        ):
            spinner.stop()
            _on_stop_signals(on_signal)  # again: ray.init put its own handler of SIGTERM in place
            _announce(state)
            _tell_parent(state)
            watch(stop)
    except KeyboardInterrupt:
        pass
    out.print("flatshare is down; nothing was left behind")


def _on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call this when somebody wants us to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _up_detached(settings: Settings) -> None:
    """Run ``up`` again as a process of its own, and wait until it says that it is ready."""
    from flatshare.local.state import PlatformState, state_folder

    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / f"up-{settings.port}.log"
    read_end, write_end = os.pipe()
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--detach", "-d")]
    with log.open("wb") as log_file:
        child = subprocess.Popen(
            [sys.executable, "-m", "flatshare.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
            pass_fds=[write_end],
            env={**os.environ, READY_FD_VARIABLE: str(write_end), "FLATSHARE_UP_LOG": str(log)},
        )
    os.close(write_end)
    try:
        with err.status("starting ..."), os.fdopen(read_end, "rb") as ready:
            line = ready.readline()  # ends when the child says so, or when it dies
    except KeyboardInterrupt:
        child.terminate()
        child.wait(STOP_TIMEOUT_S)
        raise
    if not line:
        child.wait(STOP_TIMEOUT_S)
        raise LocalError(f"flatshare did not start: {_last_line(log)} (log: {log})")
    _announce(PlatformState.parse(line.decode()))


def _tell_parent(state: Any) -> None:
    """Tell a waiting ``up --detach`` that everything answers."""
    descriptor = os.environ.pop(READY_FD_VARIABLE, "")
    if descriptor:
        with os.fdopen(int(descriptor), "wb") as ready:
            ready.write(state.text().encode() + b"\n")


def _announce(state: Any) -> None:
    """Where things are, and some commands to try."""
    model, key = "'serve_multiplexed_model_id: acme'", '"x-api-key: $KEY"'
    out.print(
        f"""flatshare is up: {state.replicas} replicas of {state.slots} slots, store {state.store}
  data plane     {state.url}/predict      docs {state.url}/docs
  control plane  {state.url}/admin        docs {state.url}/admin/docs
  {"log            " + state.log if state.log else "Ctrl-C ends it"}
Try:
  flatshare register acme model.safetensors --create --store {state.store}
  flatshare keys create acme --store {state.store}
  curl -s {state.url}/classify -H {model} -H {key} -H 'content-type: image/png' --data-binary @digit.png
  flatshare replicas""",
        soft_wrap=True,
    )


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "error:" in line), lines[-1] if lines else "it said nothing"
    )


def down(port: PortOption = None) -> None:
    """End exactly what `up` started."""
    need_serve_extra()
    import psutil

    from flatshare.local.state import PlatformState

    chosen = load_settings(port=port).port
    state = PlatformState.read(chosen)
    if state is None:
        out.print(f"flatshare does not run on port {chosen}")
        return
    process = state.process()
    if process is None:
        ended = state.end_leftovers()
        out.print(
            f"flatshare on port {chosen} had died; ended what was left: {', '.join(ended) or 'nothing'}"
        )
        return
    family = process.children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with err.status("stopping ..."):
        try:
            process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            err.print(f"pid {state.pid} did not end in {STOP_TIMEOUT_S:g} s; killing it", style="yellow")
            process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    for one in alive:
        one.kill()
    state.remove()
    out.print(f"flatshare on port {chosen} is down")


def status(port: PortOption = None, as_json: AsJson = False) -> None:
    """What runs on this machine, and whether it answers. Exit code 3 when nothing does."""
    need_serve_extra()
    from flatshare.local.state import find_states

    states = [state for state in find_states() if port in (None, state.port)]
    rows: list[dict[str, Any]] = []
    for state in states:
        row: dict[str, Any] = {"url": state.url, "pid": state.pid, "edge": state.edge, "store": state.store}
        try:
            fleet = call("GET", f"{state.url}/admin/replicas").json()
            row["answers"] = True
            row["replicas"] = {
                "running": sum(one["state"] == "RUNNING" for one in fleet["replicas"]),
                "wanted": state.replicas,
            }
            row["models"] = sum(len(one["models"]) for one in fleet["replicas"])
        except (ServeError, RegistryError, ValueError, KeyError):
            row.update(answers=False, replicas={"running": 0, "wanted": state.replicas}, models=0)
        rows.append(row)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(
            "",
            ["url", "pid#", "edge", "answers", "replicas#", "models#", "store"],
            [
                (
                    row["url"],
                    row["pid"],
                    row["edge"],
                    "yes" if row["answers"] else "no",
                    f"{row['replicas']['running']}/{row['replicas']['wanted']}",
                    row["models"],
                    row["store"],
                )
                for row in rows
            ],
        )
    else:
        out.print("flatshare does not run here; start it with: flatshare up")
    if not any(row["answers"] for row in rows):
        raise typer.Exit(3)


def edge(
    port: PortOption = None,
    serve_port: Annotated[int | None, typer.Option(show_default="8500")] = None,
    ray_address: Annotated[str, typer.Option("--ray", help="The cluster whose replicas to serve.")] = "auto",
) -> None:
    """Run only the edge, for a pool that runs on a Ray cluster: one on every node that takes requests."""
    need_serve_extra()
    settings = load_settings(port=port, serve_port=serve_port)

    from flatshare.local.ray_token import cluster_token_file
    from flatshare.pool.environment import prepare

    prepare(settings.edge, cluster_token_file(ray_address))

    from flatshare.local.platform import running_edge

    stop = threading.Event()
    with running_edge(settings, ray_address) as supervisor:
        _on_stop_signals(lambda *_: stop.set())
        out.print(f"the edge listens on http://{settings.host}:{settings.port}; Ctrl-C ends it")
        supervisor.run(stop)
