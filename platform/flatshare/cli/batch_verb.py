"""The verb ``batch``: label many rows offline, without the service."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer

from flatshare.cli.context import StoreOption, actor_name, need_serve_extra
from flatshare.cli.output import AsJson, err, out, print_json, progress_bar
from flatshare.errors import ModelFailed, SettingsError
from flatshare.settings import load_settings

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command(rich_help_panel="Models")(batch)


def batch(
    source: Annotated[
        str,
        typer.Option(
            "--input", help="A .npy or .parquet file, or a folder of either, or of .png and .jpg; or s3://..."
        ),
    ],
    output: Annotated[str, typer.Option("--output", help="Folder for the results, as Parquet.")],
    model: Annotated[str, typer.Option(help="Model of all rows: acme, acme:canary or acme@7.")] = "",
    model_column: Annotated[
        str, typer.Option(help="Column that names each row's model; for images any name: the folder does.")
    ] = "",
    image_column: Annotated[str, typer.Option(help="Column of Parquet that goes to the model.")] = "image",
    actors: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core, or as GPUs allow.")] = 0,
    gpus: Annotated[
        float, typer.Option(min=0, max=1, help="GPUs of each process: a fraction shares one.")
    ] = 0,
    ray_address: Annotated[
        str, typer.Option("--ray", help="local: a cluster of its own. auto, or an address: join one.")
    ] = "local",
    ready: Annotated[
        bool,
        typer.Option("--model-ready", help="Take whole numbers that look like raw pixels as model-ready."),
    ] = False,
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Label many rows offline: the labels that the service gives, without the service.

    It reads the store with your own credentials: no key, no quota, and an entry in each tenant's audit log.
    Run again, the same command goes on where it was cut off, with the same versions.
    """
    need_serve_extra()
    missing = [name for name in ("pyarrow", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"batch needs {', '.join(missing)}: pip install 'flatshare[batch]'")
    from flatshare.local.operators import without_keys

    settings = without_keys(load_settings(store=store, gpus_per_replica=gpus or None))

    # Ray reports Ray Data's actors as if something were wrong with them (ray-project/ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    from flatshare.local.ray_token import cluster_token_file
    from flatshare.pool.environment import prepare

    environment = prepare(settings.edge, cluster_token_file(ray_address))

    from flatshare.batch.job import Batch, BatchPlan
    from flatshare.local.cluster import ray_cluster

    plan = BatchPlan(
        source, output, model, model_column, image_column, actors, settings.gpus_per_replica, ready
    )
    work = Batch(plan, settings, actor_name())
    with contextlib.ExitStack() as stack:
        if work.done_before < work.total:
            stack.enter_context(ray_cluster(ray_address, environment))
        done = work.run(stack.enter_context(progress_bar("rows")))
    if as_json:
        print_json({**asdict(done), "rows_per_s": done.rows_per_s})
    else:
        before = f", {done.done_before} were there before" if done.done_before else ""
        out.print(
            f"{done.rows} rows labelled{before}, by {done.models} models (loaded {done.loads} times), "
            f"{done.rows_per_s:.0f} rows/s after a start of {done.start_s:.1f} s: {output}",
            soft_wrap=True,
        )
        for why, count in Counter(done.failed).most_common(10):
            err.print(f"{count} rows have no label: {why}", style="yellow", soft_wrap=True)
    if done.failed:
        raise ModelFailed(
            f"{sum(done.failed.values())} rows have no label; the same command tries them again"
        )
