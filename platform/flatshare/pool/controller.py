"""Ask Serve's controller itself, so that no dashboard is needed.

``get_serve_details`` is the call behind Ray's public REST ``GET /api/serve/applications/``; it is
pinned by ``tests/contract/test_ray_multiplex.py``.
"""

from __future__ import annotations

from typing import Any

from ray.serve.context import _get_global_client

from flatshare_registry.errors import Unavailable

__all__ = ["read_details"]


def read_details() -> dict[str, Any]:
    """Serve's instance details. Blocks for one actor call.

    Raises
    ------
    Unavailable
        Serve is not running, or its controller does not answer.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        raise Unavailable("Ray Serve is not running")
    try:
        details: dict[str, Any] = client.get_serve_details()
    except Exception as error:  # ray raises a dozen kinds for a dead or busy controller
        raise Unavailable(f"Serve's controller does not answer: {type(error).__name__}") from error
    return details
