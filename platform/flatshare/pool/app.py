"""The pool for Ray Serve's config files: ``import_path: flatshare.pool.app:build``.

``flatshare config`` prints such a file.
"""
# No postponed annotations here: Serve checks whether a builder's annotation is a class. If it is a string,
# Serve silently passes the builder a plain dictionary (ray/serve/_private/api.py, 2.60).

from ray import serve

from flatshare.pool.app_arguments import AppArguments, built
from flatshare.pool.deployment import pool_application
from flatshare.pool.kept import Deployed, forget, remember_deployed

__all__ = ["build"]


def build(args: AppArguments) -> serve.Application:
    """The pool. From now on ``rollout`` and ``settings set`` begin with what the file says."""
    found = built(args)
    forget()
    remember_deployed(Deployed(found.settings, found.operators, found.environment))
    return pool_application(found.settings, found.operators, found.environment)
