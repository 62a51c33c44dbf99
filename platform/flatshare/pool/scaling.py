"""The pool's number of replicas, as Serve keeps it: read and changed.

Serve takes the number from outside (``external_scaler_enabled``) and acts within a tenth of a second; 0 is
allowed. Serve's own autoscaler is not used: it samples a gauge, does not see requests of a millisecond, and
calls a policy that is pickled into its controller. Both calls are pinned by
``tests/contract/test_ray_scaling.py``.
"""

from __future__ import annotations

from typing import Any, Final

import ray
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.context import _get_global_client

from flatshare.pool.controller import read_details
from flatshare.pool.handle import POOL_APP, POOL_DEPLOYMENT
from flatshare_registry.errors import Unavailable

__all__ = ["ServeScaler"]

CALL_S: Final = 5.0


class ServeScaler:
    """Serve's word on the pool's replicas. All methods block."""

    def wanted(self) -> int:
        """How many replicas Serve keeps.

        Raises
        ------
        Unavailable
            Serve does not say.
        """
        return int(self._pool()["target_num_replicas"])

    def scale(self, replicas: int) -> None:
        """Have Serve keep so many; returns once it knows. Raises as :meth:`wanted`."""
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is None:
            raise Unavailable("Ray Serve is not running")
        controller: Any = client._controller
        pool = DeploymentID(name=POOL_DEPLOYMENT, app_name=POOL_APP)
        try:
            ray.get(controller.update_deployment_replicas.remote(pool, replicas), timeout=CALL_S)
        except Exception as error:  # ray raises a dozen kinds for a dead or busy controller
            raise Unavailable(f"Serve does not change the pool's size: {type(error).__name__}") from error

    def newest(self) -> str | None:
        """The replica that Serve stops first on one node: the newest. Raises as :meth:`wanted`."""
        running = [one for one in self._pool()["replicas"] if str(one["state"]).endswith("RUNNING")]
        if not running:
            return None
        return str(max(running, key=lambda one: float(one["start_time_s"]))["replica_id"])

    def end(self, replica: str) -> None:
        """End a replica's process at once; Serve sees it and starts another one. Raises as :meth:`wanted`."""
        name = ReplicaID(replica, DeploymentID(name=POOL_DEPLOYMENT, app_name=POOL_APP)).to_full_id_str()
        try:
            ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))
        except Exception as error:  # it may have gone by itself
            raise Unavailable(f"replica {replica} is not there: {type(error).__name__}") from error

    @staticmethod
    def _pool() -> dict[str, Any]:
        details = read_details()["applications"].get(POOL_APP, {}).get("deployments", {})
        pool: dict[str, Any] | None = details.get(POOL_DEPLOYMENT)
        if pool is None:
            raise Unavailable("the pool is not deployed")
        return pool
