"""The platform as one of Ray Serve's config files, and what a cluster's nodes must have in their
environment.
"""

from __future__ import annotations

import copy
from typing import Any, Final

from flatshare.errors import SettingsError
from flatshare.pool.environment import QUIET, serve_environment
from flatshare.settings import Settings

__all__ = ["cluster_environment", "serve_config"]

ABOUT: Final = """\
# Made by `flatshare config`. Nodes need the variables of `flatshare config --environment` before `ray start`;
# then `serve deploy FILE`, and `flatshare edge` on each node that takes requests.
"""

NOT_SHOWN: Final = {"admin_key", "viewer_key", "api_key", "url"}
"""Secrets, and what clients alone read."""


def serve_config(settings: Settings, admin_key_file: str, viewer_key_file: str = "") -> str:
    """A config file of these settings, as YAML.

    Raises
    ------
    SettingsError
        Something that has a default on one machine must be named for a cluster.
    """
    import yaml  # type: ignore[import-untyped]  # it has no types, and is asked once

    from flatshare.control.deployment import CONTROL_APP, CONTROL_PREFIX
    from flatshare.pool.handle import POOL_APP
    from flatshare.pool.steps import step_app
    from flatshare.pool.task_names import TASKS_APP

    chosen = settings.model_dump(mode="json", exclude_defaults=True, exclude=NOT_SHOWN)
    if settings.auth == "on" and not admin_key_file:
        raise SettingsError("--admin-key-file: where the head has the operator's key; or --auth off")
    if not settings.erasure_key_file:
        raise SettingsError("FLATSHARE_ERASURE_KEY_FILE: where the head keeps the key of erasure records")
    if settings.tasks == "embedded" and not settings.tasks_file:
        raise SettingsError("FLATSHARE_TASKS_FILE: where the node has the queue; or FLATSHARE_TASKS=redis")
    arguments: dict[str, Any] = {"settings": chosen}
    if settings.auth == "on":
        arguments["admin_key_file"] = admin_key_file
        if viewer_key_file:
            arguments["viewer_key_file"] = viewer_key_file

    def app(name: str, prefix: str | None, builder: str, scaled: bool = False, **more: str) -> dict[str, Any]:
        return {
            "name": name, "route_prefix": prefix, "import_path": builder, "external_scaler_enabled": scaled,
            "args": {**copy.deepcopy(arguments), **more},
        }  # fmt: skip

    apps = [
        app(step_app(name), None, "flatshare.pipelines.app:build", pipeline=name)
        for name in settings.pipelines
    ]
    apps.append(app(POOL_APP, "/", "flatshare.pool.app:build", scaled=True))
    if settings.tasks != "off":
        apps.append(app(TASKS_APP, None, "flatshare.pool.tasks_app:build", scaled=True))
    apps.append(app(CONTROL_APP, CONTROL_PREFIX, "flatshare.control.app_builder:build"))
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {
            "host": "127.0.0.1" if settings.nodes == "one" else "0.0.0.0",  # noqa: S104  # on purpose
            "port": settings.port if settings.edge == "serve" else settings.serve_port,
        },
        "applications": apps,
    }
    text: str = yaml.safe_dump(document, sort_keys=False, width=110)
    return ABOUT + text


def cluster_environment(settings: Settings) -> dict[str, str]:
    """Variables that each node needs before ``ray start``: Serve's processes read them when they start."""
    return {**serve_environment(settings.edge), **QUIET, "RAY_worker_niceness": "0"}
