"""What a platform keeps in its cluster's own key-value store (GCS), for as long as the cluster lives.

A control plane that dies, and a command that joins the cluster later, find there what an operator allowed
and what was deployed. It is of the cluster's trust domain, as Serve's own records of the same arguments are:
settings without secrets, digests of operators' keys, and the key that the pool's own replicas show each
other, which is kept nowhere else. ``tests/contract/test_ray_scaling.py`` pins the calls.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from ray.experimental import internal_kv

from flatshare.api.identity import OperatorKeys
from flatshare.settings import Settings, settings_of
from flatshare_registry.errors import Unavailable

__all__ = [
    "Deployed",
    "change_deployed",
    "forget",
    "recall_bounds",
    "recall_deployed",
    "recall_moved",
    "remember_bounds",
    "remember_deployed",
    "remember_moved",
    "shared_peer_key",
]

_NAMESPACE: Final = b"flatshare"


@dataclass(frozen=True, slots=True)
class Deployed:
    """The arguments of the pool that runs.

    Attributes
    ----------
    settings
        Without secrets.
    operators
        Digests of operators' keys; None when authentication is off.
    environment
        Variables of Serve's processes.
    revision
        How often settings were changed since.
    """

    settings: Settings
    operators: OperatorKeys | None
    environment: dict[str, str]
    revision: int = 0


def remember_deployed(deployed: Deployed) -> None:
    """Keep what was deployed. Blocks, as the others do."""
    operators = deployed.operators
    document = {
        "settings": deployed.settings.model_dump(mode="json"),
        "operators": None if operators is None else dict(operators.digests),
        "environment": deployed.environment,
        "revision": deployed.revision,
    }
    _put(b"deployed", json.dumps(document).encode())


def recall_deployed() -> Deployed | None:
    """What was deployed last on this cluster; None for nothing."""
    value = _get(b"deployed")
    if value is None:
        return None
    document = json.loads(value)
    operators = document["operators"]
    return Deployed(
        settings_of(document["settings"]),
        None if operators is None else OperatorKeys(operators),
        document["environment"],
        document["revision"],
    )


def change_deployed(change: Callable[[Settings], Settings]) -> Deployed:
    """Change the settings that are kept; returns what is kept now. One caller at a time.

    Raises
    ------
    Unavailable
        Nothing was deployed on this cluster.
    """
    deployed = recall_deployed()
    if deployed is None:
        raise Unavailable("this cluster does not know what was deployed")
    new = dataclasses.replace(deployed, settings=change(deployed.settings), revision=deployed.revision + 1)
    remember_deployed(new)
    return new


def remember_bounds(minimum: int, maximum: int) -> None:
    """Keep the fewest and the most replicas that an operator allows."""
    _put(b"bounds", json.dumps([minimum, maximum]).encode())


def recall_bounds() -> tuple[int, int] | None:
    """What an operator allowed last on this cluster; None for nothing."""
    value = _get(b"bounds")
    if value is None:
        return None
    minimum, maximum = json.loads(value)
    return int(minimum), int(maximum)


def remember_moved(moved: Mapping[str, int]) -> None:
    """Keep which models were moved to which place."""
    _put(b"moved", json.dumps(dict(moved)).encode())


def recall_moved() -> dict[str, int]:
    """Which models were moved to which place."""
    found: dict[str, int] = json.loads(_get(b"moved") or b"{}")
    return found


def shared_peer_key(candidate: bytes) -> bytes:
    """The key that the pool's replicas share: the first one that any of them proposed."""
    try:
        internal_kv._internal_kv_put(b"peer-key", candidate, overwrite=False, namespace=_NAMESPACE)
        kept = _get(b"peer-key")
    except Exception as error:  # ray and gRPC have a dozen kinds
        raise Unavailable(f"the cluster does not say the pool's key: {type(error).__name__}") from error
    if kept is None:
        raise Unavailable("the cluster does not keep the pool's key")
    return kept


def forget() -> None:
    """Forget everything of an earlier platform: a new one begins with its own settings.

    The peers' key stays, because a new platform gets here while replicas of the old one still run.
    """
    for key in (b"bounds", b"moved", b"deployed"):
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def _put(key: bytes, value: bytes) -> None:
    try:
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE)
    except Exception as error:  # ray and gRPC have a dozen kinds
        raise Unavailable(f"the cluster does not keep it: {type(error).__name__}") from error


def _get(key: bytes) -> bytes | None:
    value: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return value
