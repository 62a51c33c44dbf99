"""The pool, for whoever only asks it: its names in Serve, and a handle. No torch in here."""

from __future__ import annotations

from typing import Any, Final

from ray import serve
from ray.serve.handle import DeploymentHandle

__all__ = ["POOL_APP", "POOL_DEPLOYMENT", "pool_handle"]

POOL_APP: Final = "flatshare"
POOL_DEPLOYMENT: Final = "ClassifierPool"


def pool_handle() -> DeploymentHandle[Any]:
    """A handle on the running pool."""
    return serve.get_deployment_handle(POOL_DEPLOYMENT, POOL_APP)
