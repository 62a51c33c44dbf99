"""A deployment's number of replicas, as Serve keeps it: read and changed.

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
    """Serve's word on the replicas of one deployment, the pool by default. All methods block."""

    def __init__(self, app: str = POOL_APP, deployment: str = POOL_DEPLOYMENT) -> None:
        self._id = DeploymentID(name=deployment, app_name=app)

    def wanted(self) -> int:
        """How many replicas Serve keeps.

        Raises
        ------
        Unavailable
            Serve does not say.
        """
        return int(self._details()["target_num_replicas"])

    def scale(self, replicas: int) -> None:
        """Have Serve keep so many; returns once it knows. Raises as :meth:`wanted`."""
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is None:
            raise Unavailable("Ray Serve is not running")
        controller: Any = client._controller
        try:
            ray.get(controller.update_deployment_replicas.remote(self._id, replicas), timeout=CALL_S)
        except Exception as error:  # ray raises a dozen kinds for a dead or busy controller
            why = type(error).__name__
            raise Unavailable(f"Serve does not change {self._id.name}'s size: {why}") from error

    def newest(self) -> str | None:
        """The replica that Serve stops first on one node: the newest. Raises as :meth:`wanted`."""
        running = [one for one in self._details()["replicas"] if str(one["state"]).endswith("RUNNING")]
        if not running:
            return None
        return str(max(running, key=lambda one: float(one["start_time_s"]))["replica_id"])

    def end(self, replica: str) -> None:
        """End a replica's process at once; Serve sees it and starts another one. Raises as :meth:`wanted`."""
        name = ReplicaID(replica, self._id).to_full_id_str()
        try:
            ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))
        except Exception as error:  # it may have gone by itself
            raise Unavailable(f"replica {replica} is not there: {type(error).__name__}") from error

    def _details(self) -> dict[str, Any]:
        details = read_details()["applications"].get(self._id.app_name, {}).get("deployments", {})
        found: dict[str, Any] | None = details.get(self._id.name)
        if found is None:
            raise Unavailable(f"{self._id.name} is not deployed")
        return found
