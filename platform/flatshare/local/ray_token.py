"""The token of the Ray cluster: a caller that shows none gets no answer from Ray's and Serve's own ports.

Ray's daemons, its workers and each replica listen for gRPC calls on all interfaces, on ports of their own
choice, and take pickled data from them. In token mode (``RAY_AUTH_MODE=token``) every call must show the
token, which is in the file that ``RAY_AUTH_TOKEN_PATH`` names. Both are read when ray is imported, so this
module imports no ray.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Final

from flatshare.local.private_file import make_private
from flatshare.local.state import find_states, state_folder

__all__ = ["cluster_token_file", "joins_a_cluster"]

DEFAULT_TOKEN: Final = Path(".ray") / "auth_token"
"""Where Ray itself looks, below the home folder, when nothing else is said."""


def joins_a_cluster(ray_address: str) -> bool:
    """Whether this address means a cluster that somebody has started already.

    Parameters
    ----------
    ray_address
        ``local``, ``auto``, or an address.
    """
    if ray_address == "local":
        return False
    if ray_address != "auto" or os.environ.get("RAY_ADDRESS"):
        return True
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return (Path(temporary) / "ray" / "ray_current_cluster").exists()


def cluster_token_file(ray_address: str) -> Path:
    """The file of the token to show to a cluster, or to start one with.

    It is the file beside the operator's key, which is made when it is missing. For a cluster that ``up`` did
    not start it is Ray's own file, if there is one.

    Raises
    ------
    LocalError
        Others can read our file.
    """
    ours = state_folder() / "ray.token"
    if joins_a_cluster(ray_address):
        started_here = {state.ray_address for state in find_states()}
        default = Path(os.path.expanduser("~")) / DEFAULT_TOKEN
        if (
            ray_address not in started_here
            and not (ray_address == "auto" and started_here)
            and default.exists()
        ):
            return default
    make_private(ours, lambda: secrets.token_hex(32))
    return ours
