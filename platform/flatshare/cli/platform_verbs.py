"""Verbs that run a platform on this machine: up, rollout; ``running_verbs`` has down and status."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import typer

from flatshare.cli.context import StoreOption, need_serve_extra
from flatshare.cli.output import err, out
from flatshare.cli.running_verbs import STOP_TIMEOUT_S, PortOption, down, status
from flatshare.cli.settings_verbs import named_values
from flatshare.errors import LocalError, SettingsError
from flatshare.process_log import log_as
from flatshare.settings import Settings, load_settings
from flatshare_registry.errors import Unavailable
from flatshare_registry.identity import ensure_identity

READY_FD_VARIABLE: Final = "FLATSHARE_READY_FD"
"""Set by ``up --detach`` for its child: where to write one JSON line when everything answers."""

RayOption = Annotated[
    str,
    typer.Option(
        "--ray",
        help="auto: a running Ray cluster, else one of our own. local: always our own. Or an address.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for function in (up, down, status, rollout):
        app.command(rich_help_panel="This machine")(function)


def up(
    store: StoreOption = None,
    replicas: Annotated[int | None, typer.Option(show_default="2", help="Replicas in the pool.")] = None,
    min_replicas: Annotated[
        int | None,
        typer.Option(show_default="--replicas", help="Fewest, when little comes; 0: none."),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(show_default="--replicas", help="Most: the pool grows to it under load.")
    ] = None,
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
        min_replicas=min_replicas,
        max_replicas=max_replicas,
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
    try:
        ensure_identity(settings.open_store())  # also sees that it honours conditional writes
    except Unavailable as error:  # what is resident or on the node can be served all the same
        warn(f"the store does not answer now: {error.message}")

    from flatshare.local.checks import check_machine
    from flatshare.local.state import PlatformState

    log_as(settings.log_format, settings.log_level, "up")
    PlatformState.make_way(settings.port)
    check_machine(settings, warn=warn)
    if detach:
        _up_detached(settings)
    else:
        _up_here(settings, ray_address)


def _up_here(settings: Settings, ray_address: str) -> None:
    """Run until told to stop; everything ends with this process."""
    from flatshare.local.state import PlatformState

    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            return  # already stopping: a second Ctrl-C must not leave half of it behind
        stop.set()
        raise KeyboardInterrupt

    on_stop_signals(on_signal)
    state = PlatformState.starting(settings, log=os.environ.get("FLATSHARE_UP_LOG", ""))
    try:
        parent = _parent()
        with err.status("starting ...") as spinner:
            try:
                state.claim()

                from flatshare.local.ray_token import cluster_token_file
                from flatshare.pool.environment import prepare

                environment = prepare(settings.edge, cluster_token_file(ray_address))

                # Only now: ray reads its flags when it is imported.
                from flatshare.local.notify import notify
                from flatshare.local.operators import operators_of
                from flatshare.local.platform import running_platform

                settings, operators = operators_of(settings)
                with running_platform(
                    settings,
                    state,
                    operators,
                    environment,
                    ray_address,
                    report=lambda text: spinner.update(f"{text} ..."),
                ) as (state, watch):
                    spinner.stop()
                    _announce(state)
                    parent.tell(state.text())
                    notify("READY=1")
                    watch(stop)
                    notify("STOPPING=1")
            finally:
                state.remove()
    except KeyboardInterrupt:
        pass
    out.print("flatshare is down; nothing was left behind")


def warn(text: str) -> None:
    """Show a warning."""
    err.print(f"warning: {text}", style="yellow", soft_wrap=True)


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call ``handler`` when a signal asks us to end; signals that ``nohup`` or ``&`` ignore stay ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _up_detached(settings: Settings) -> None:
    """Run ``up`` again as a process of its own, and wait until it says that it is ready."""
    from flatshare.local.state import PlatformState, state_folder

    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / f"up-{settings.port}.log"
    read_end, write_end = os.pipe()
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--detach", "-d")]

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    on_stop_signals(on_signal)
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


class _Parent:
    """The ``up --detach`` that waits for us, if any: told when everything answers; we notice when it dies.

    Parameters
    ----------
    descriptor
        The end of a pipe that it reads; None when nobody waits.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._told = threading.Event()

    def watch(self) -> None:
        """Stop this process if the other one ends before it was told: nobody was told that this one is up."""
        if self._descriptor is None:
            return
        os.set_inheritable(self._descriptor, False)
        poll = select.poll()
        poll.register(self._descriptor, 0)  # only POLLERR: nobody reads any more
        while not poll.poll():
            pass
        if not self._told.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def tell(self, text: str) -> None:
        """Tell it that everything answers."""
        self._told.set()
        if self._descriptor is None:
            return
        try:
            os.write(self._descriptor, text.encode() + b"\n")
        except BrokenPipeError:  # it ended a moment ago
            raise KeyboardInterrupt from None


def _parent() -> _Parent:
    """The parent of this process."""
    descriptor = os.environ.pop(READY_FD_VARIABLE, "")
    parent = _Parent(int(descriptor) if descriptor else None)
    threading.Thread(target=parent.watch, daemon=True, name="parent").start()
    return parent


def _announce(state: Any) -> None:
    """Where things are, and some commands to try."""
    # Who named the store in the environment need not name it again.
    store = "" if os.environ.get("FLATSHARE_STORE") == state.store else f" --store {state.store}"
    model, key = "'serve_multiplexed_model_id: acme'", '"x-api-key: $KEY"'
    out.print(
        f"""flatshare is up: {state.replicas} replicas of {state.slots} slots, store {state.store}
  data plane     {state.url}/predict      docs {state.url}/docs
  control plane  {state.url}/admin        docs {state.url}/admin/docs
  {"log            " + state.log if state.log else "Ctrl-C ends it"}
Try:
  flatshare register acme model.safetensors --create{store}
  export KEY=$(flatshare keys create acme{store})
  flatshare train digits
  curl -s {state.url}/classify -H {model} -H {key} -H 'content-type: image/png' --data-binary @digits/0.png
  flatshare replicas""",
        soft_wrap=True,
    )


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "error:" in line), lines[-1] if lines else "it said nothing"
    )


def rollout(
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the replicas to change (repeatable)."),
    ] = None,
    surge: Annotated[
        bool,
        typer.Option(
            "--surge/--no-surge",
            help="Start a new replica before an old one stops; needs memory, or GPUs, for one more.",
        ),
    ] = True,
    port: PortOption = None,
) -> None:
    """Replace every replica, one after the other, with the code that is installed now; also with other
    settings.

    Requests go on meanwhile. A new replica takes them once it has loaded what it will be home to. Settings
    that were not named stay as they were. If new replicas do not start, the old ones stay.
    """
    need_serve_extra()
    given = named_values(changes or [])

    from flatshare.local.state import PlatformState

    state = PlatformState.read(load_settings(port=port).port)
    if state is None or state.process() is None or state.phase != "running":
        raise LocalError("flatshare does not run here on this port; flatshare status shows what does")

    from flatshare.local.ray_token import cluster_token_file
    from flatshare.pool.environment import prepare

    prepare("haproxy" if state.edge == "haproxy" else "serve", cluster_token_file(state.ray_address))

    from flatshare.local.rollout import roll_out

    with err.status("starting new replicas ...") as spinner:
        settings = roll_out(
            state.ray_address, given, surge=surge, report=lambda text: spinner.update(f"{text} ...")
        )
    named = ", ".join(f"{name}={getattr(settings, name)}" for name in given) or "the same settings"
    out.print(f"every replica is new, with {named}")
