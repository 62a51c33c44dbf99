"""A rollout: every replica of a running pool is replaced, by new code or with other settings.

Imports ray, so it must be imported only after ``pool.environment.prepare``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Final

from flatshare.errors import LocalError, SettingsError
from flatshare.live_settings import LIVE, changed
from flatshare.local.cluster import joined_cluster
from flatshare.local.platform import Report, deploy
from flatshare.pool.controller import read_details
from flatshare.pool.details import replica_states
from flatshare.pool.handle import POOL_APP, POOL_DEPLOYMENT
from flatshare.pool.kept import change_deployed, recall_deployed
from flatshare.pool.scaling import ServeScaler
from flatshare.settings import Settings
from flatshare_registry.errors import Unavailable

__all__ = ["changed_settings", "roll_out"]

ROLLED_OUT: Final = frozenset({
    "slots", "device_bytes", "device_headroom_bytes", "eviction", "host_dir", "host_bytes", "torch_threads",
    "fetch_timeout_s", "fetch_concurrency", "max_batch_rows", "stack_models", "view_ttl_s", "warm_up_s",
    "body_memory_bytes", "max_rows",
})  # fmt: skip
"""Settings that only replicas read. The edge, the control plane or the cluster have read the others too."""


def roll_out(ray_address: str, changes: Mapping[str, object], *, surge: bool, report: Report) -> Settings:
    """Replace every replica of a running pool, one after the other, by new code or with other settings.

    Parameters
    ----------
    changes
        Settings by name; all else stays as it was deployed.
    surge
        Start a new replica before an old one stops.
    report
        Called with what is going on now.

    Returns
    -------
    Settings
        What runs now.

    Raises
    ------
    LocalError
        There is no pool, or new replicas do not start: the old ones go on.
    SettingsError
        A setting is read by more than the replicas, or its new value contradicts others.
    """
    with joined_cluster(ray_address):
        deployed = recall_deployed()
        scaler = ServeScaler()
        try:
            replicas = scaler.wanted()
        except Unavailable as error:
            raise LocalError(f"there is no pool to roll out: {error.message}") from error
        if deployed is None:
            raise LocalError(
                "this cluster does not know what was deployed; end the platform, and start it anew"
            )
        if replicas == 0:
            raise LocalError(
                "the pool has no replica to replace, and nothing was changed: flatshare scale 1 first"
            )
        settings = changed_settings(deployed.settings, changes)
        from flatshare.pool.deployment import pool_application

        application = pool_application(
            settings, deployed.operators, deployed.environment, replicas=replicas, surge=surge
        )
        old = {one.replica for one in replica_states(read_details(), POOL_APP, POOL_DEPLOYMENT)}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(1.0):
                with contextlib.suppress(Unavailable):
                    states = replica_states(read_details(), POOL_APP, POOL_DEPLOYMENT)
                    new = [one for one in states if one.replica not in old and one.state == "RUNNING"]
                    report(f"{len(new)} of {replicas} replicas are new")

        watcher = threading.Thread(target=watch, daemon=True, name="rollout")
        watcher.start()
        try:
            deploy(application, POOL_APP, "/", scaled=True)
        finally:
            done.set()
            watcher.join()
        # What was changed in place meanwhile stays changed.
        return change_deployed(lambda now: changed_settings(now, changes)).settings


def changed_settings(settings: Settings, changes: Mapping[str, object]) -> Settings:
    """The same settings but for these.

    Raises
    ------
    SettingsError
        One can't change in a rollout, or what comes out contradicts itself.
    """
    for name in changes:
        if name in LIVE:
            raise SettingsError(f"{name} needs no rollout: flatshare settings set {name}=...")
    otherwise = "while the platform runs: end it, and start it with the new value"
    return changed(settings, changes, ROLLED_OUT, otherwise)
