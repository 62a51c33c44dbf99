"""Verbs for a Ray cluster of one's own: its config file, and an edge on each node that takes requests."""

from __future__ import annotations

import contextlib
import threading
from types import FrameType
from typing import Annotated

import typer

from flatshare.cli.context import need_serve_extra
from flatshare.cli.output import out
from flatshare.cli.platform_verbs import on_stop_signals, warn
from flatshare.cli.running_verbs import PortOption
from flatshare.process_log import log_as
from flatshare.settings import load_settings

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for function in (edge, config):
        app.command(rich_help_panel="This machine")(function)


def edge(
    port: PortOption = None,
    serve_port: Annotated[int | None, typer.Option(show_default="8500")] = None,
    ray_address: Annotated[str, typer.Option("--ray", help="The cluster whose replicas to serve.")] = "auto",
) -> None:
    """Run only the edge, for a pool that runs on a Ray cluster: one on every node that takes requests."""
    need_serve_extra()
    settings = load_settings(port=port, serve_port=serve_port)
    log_as(settings.log_format, settings.log_level, "edge")

    from flatshare.local.checks import check_edge
    from flatshare.local.notify import notify
    from flatshare.local.state import url_of

    check_edge(settings, warn=warn)

    from flatshare.local.ray_token import cluster_token_file
    from flatshare.pool.environment import prepare

    prepare(settings.edge, cluster_token_file(ray_address))

    from flatshare.local.platform import running_edge

    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            stop.set()
            raise KeyboardInterrupt

    on_stop_signals(on_signal)
    with contextlib.suppress(KeyboardInterrupt), running_edge(settings, ray_address) as supervisor:
        out.print(f"the edge listens on {url_of(settings)}; Ctrl-C ends it")
        notify("READY=1")
        supervisor.run(stop)


def config(
    admin_key_file: Annotated[
        str, typer.Option(help="Where the cluster's head has the operator's key; not read here.")
    ] = "",
    viewer_key_file: Annotated[str, typer.Option(help="The same, for the key that may only look.")] = "",
    environment: Annotated[
        bool, typer.Option("--environment", help="Print what each node needs before `ray start` instead.")
    ] = False,
) -> None:
    """Print the platform as a config file of Ray Serve, for `serve deploy` on a cluster of your own.

    Settings are those of the environment (FLATSHARE_*); keys are named by file, and never printed.
    """
    need_serve_extra()
    from flatshare.local.serve_config import cluster_environment, serve_config

    settings = load_settings()
    if environment:
        for name, value in cluster_environment(settings).items():
            out.print(f"export {name}={value}", soft_wrap=True)
        return
    out.print(serve_config(settings, admin_key_file, viewer_key_file), end="", soft_wrap=True)
