"""The control plane for Ray Serve's config files: ``import_path: flatshare.control.app_builder:build``."""
# No postponed annotations here, as in ``pool/app.py``.

from ray import serve

from flatshare.control.deployment import control_application
from flatshare.pool.app_arguments import AppArguments, built

__all__ = ["build"]


def build(args: AppArguments) -> serve.Application:
    """The control plane; the same arguments as the pool's."""
    found = built(args)
    return control_application(found.settings, found.operators, found.environment)
