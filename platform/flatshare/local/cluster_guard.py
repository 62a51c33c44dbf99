"""Whether a Ray cluster asks callers for its token, and what we refuse when it does not."""

from __future__ import annotations

import logging
from typing import Final

import grpc

from flatshare.errors import LocalError
from flatshare.settings import LOOPBACK_HOSTS, Settings

__all__ = ["asks_for_token", "check_cluster"]

logger = logging.getLogger("flatshare.local")

_ASK: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"
TIMEOUT_S: Final = 5.0


def asks_for_token(gcs_address: str) -> bool:
    """Whether a cluster refuses a call without its token. Blocks for one call.

    Raises
    ------
    LocalError
        Nothing answers there.
    """
    # Straight to it: a proxy that the environment names knows nothing of this cluster.
    with grpc.insecure_channel(gcs_address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ASK)(b"", timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            code = error.code()
            if code is grpc.StatusCode.UNAUTHENTICATED:
                return True
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise LocalError(f"no Ray cluster answers at {gcs_address}") from error
    return False


def check_cluster(gcs_address: str, settings: Settings) -> None:
    """Warn if a cluster lets in everybody who reaches it, and refuse to open such a cluster further.

    Whoever reaches one of its ports can run code as the platform, whatever key a request needs.

    Raises
    ------
    LocalError
        The platform is to listen beyond loopback, and no setting says that the network is trusted.
    """
    if asks_for_token(gcs_address):
        return
    how = "start Ray with RAY_AUTH_MODE=token"
    beyond = settings.host not in LOOPBACK_HOSTS or settings.nodes == "several"
    if beyond and not settings.trust_ray_network:
        raise LocalError(
            f"the Ray cluster at {gcs_address} asks callers for no token, so who reaches its ports can run "
            f"code on it: {how}, listen on loopback only, or set FLATSHARE_TRUST_RAY_NETWORK=1 if a firewall "
            "keeps others out"
        )
    logger.warning(
        "the Ray cluster at %s asks callers for no token: who reaches its ports can run code on it; %s",
        gcs_address,
        how,
    )
