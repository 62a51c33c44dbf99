"""The control plane as a Serve application: one replica, no device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, cast

from ray import serve

from flatshare.api.identity import Identities, OperatorKeys
from flatshare.api.tokens import token_verifier
from flatshare.control.access import Gate
from flatshare.control.app import RegistryHeads, create_control_app
from flatshare.control.fleet import Fleet
from flatshare.pool.controller import read_details
from flatshare.pool.details import ReplicaState, replica_states
from flatshare.pool.handle import POOL_APP, POOL_DEPLOYMENT, pool_handle
from flatshare.settings import Settings
from flatshare_registry.catalog import Registry

__all__ = ["CONTROL_APP", "CONTROL_PREFIX", "control_application"]

CONTROL_APP: Final = "flatshare-control"
CONTROL_PREFIX: Final = "/admin"


def _pool_states() -> list[ReplicaState]:
    return replica_states(read_details(), POOL_APP, POOL_DEPLOYMENT)


class ControlPlane:
    """Composition root of the control plane."""

    def __init__(self, settings: Settings, operators: OperatorKeys | None) -> None:
        self._settings = settings
        self._operators = operators

    def __serve_build_asgi_app__(self) -> Gate:
        """Called by Serve after the constructor."""
        registry = Registry(self._settings.open_store(), actor="control-plane")
        fleet = Fleet(pool_handle(), _pool_states, registry.any_head)
        identities = Identities(RegistryHeads(registry), self._operators, token_verifier(self._settings))
        return create_control_app(
            registry, fleet, identities, self._settings.plans, Path(self._settings.erasure_key_file),
            default_quotas=self._settings.default_quotas,
        )  # fmt: skip


def control_application(
    settings: Settings, operators: OperatorKeys | None, environment: dict[str, str]
) -> serve.Application:
    """The control plane as a Serve application; the pool must be deployed first."""
    # serve.deployment is typed for use as a decorator only.
    deployment = cast("Any", serve.deployment)(
        serve.ingress()(ControlPlane),
        name="ControlPlane",
        num_replicas=1,
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": {"env_vars": {**environment, "CUDA_VISIBLE_DEVICES": ""}},
        },
        # Refusals wait a tenth of a second in a place; the edge bounds how many one address can have.
        max_ongoing_requests=128,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5,
    )
    application: serve.Application = deployment.bind(settings, operators)
    return application
