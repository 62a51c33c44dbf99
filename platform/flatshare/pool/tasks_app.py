"""The consumer of tasks for Ray Serve's config files: ``import_path: flatshare.pool.tasks_app:build``."""
# No postponed annotations here, as in ``pool/app.py``.

from ray import serve

from flatshare.pool.app_arguments import AppArguments, built
from flatshare.pool.consumer import consumer_application

__all__ = ["build"]


def build(args: AppArguments) -> serve.Application:
    """The consumer; the same arguments as the pool's."""
    found = built(args)
    return consumer_application(found.settings, found.environment)
