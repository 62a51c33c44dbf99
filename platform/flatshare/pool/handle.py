"""Names in Serve and handles of the pool and the control plane, for code that only calls them. No torch."""

from __future__ import annotations

from typing import Any, Final

from ray import serve
from ray.serve.handle import DeploymentHandle

__all__ = [
    "CONTROL_APP", "CONTROL_DEPLOYMENT", "POOL_APP", "POOL_DEPLOYMENT", "control_handle", "pool_handle",
]  # fmt: skip

POOL_APP: Final = "flatshare"
POOL_DEPLOYMENT: Final = "ClassifierPool"
CONTROL_APP: Final = "flatshare-control"
CONTROL_DEPLOYMENT: Final = "ControlPlane"


def pool_handle() -> DeploymentHandle[Any]:
    """A handle on the running pool."""
    return serve.get_deployment_handle(POOL_DEPLOYMENT, POOL_APP)


def control_handle() -> DeploymentHandle[Any]:
    """A handle on the running control plane."""
    return serve.get_deployment_handle(CONTROL_DEPLOYMENT, CONTROL_APP)
