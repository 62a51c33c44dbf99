"""A pipeline's step for Ray Serve's config files: ``import_path: flatshare.pipelines.app:build``."""
# No postponed annotations here, as in ``pool/app.py``.

from ray import serve

from flatshare.errors import SettingsError
from flatshare.pipelines.deployment import step_application
from flatshare.pool.app_arguments import AppArguments, built

__all__ = ["StepArguments", "build"]


class StepArguments(AppArguments):
    """As the pool's, and which of its pipelines this is."""

    pipeline: str


def build(args: StepArguments) -> serve.Application:
    """The step of one pipeline."""
    found = built(args)
    step = found.settings.pipelines.get(args.pipeline)
    if step is None:
        raise SettingsError(f"settings name no pipeline {args.pipeline}")
    return step_application(args.pipeline, step, found.environment, found.settings)
