"""``flatshare bench``: load against a running platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from flatshare.cli.context import UrlOption, call, credentials, need_serve_extra, platform_url
from flatshare.cli.output import AsJson, out, print_json, print_table, progress_bar
from flatshare_registry.errors import InvalidInput, NotFound

PLOT_SUFFIXES: Final = (".png", ".svg", ".pdf")


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command(rich_help_panel="Running platform")(bench)


def bench(
    tenants: Annotated[
        str | None,
        typer.Option(
            help="How many of the platform's tenants, or their refs: acme,globex:canary. All by default."
        ),
    ] = None,
    zipf: Annotated[float, typer.Option(min=0, help="Exponent of popularity; 0 is all alike.")] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Stop after so many seconds.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1000, help="Closed loop: requests in flight.")] = 16,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Open loop: requests a second.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in one request.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the draw of tenants and images.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw the run into this PNG.")] = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Send real digits to a running platform; report throughput, latency, errors and hit rates.

    Hit rates are shown as the client saw them (reply headers) and as the servers counted them.
    Exit code 1 when not one request was answered.
    """
    need_serve_extra()
    from flatshare.bench.load import Load, Outcome, run_load
    from flatshare.bench.report import compare_hits, summarise
    from flatshare.bench.workload import digit_shots
    from flatshare.models.architecture import architecture
    from flatshare.training.mnist import load_digits

    if plot is not None and (plot.suffix not in PLOT_SUFFIXES or not plot.parent.is_dir()):
        raise InvalidInput(f"--plot {plot}: name a {', '.join(PLOT_SUFFIXES)} file in a folder that exists")
    base = platform_url(url)
    models = _models(tenants, base)
    if requests is None and duration is None:
        duration = 10.0
    images = architecture("mnist-cnn").preprocess(load_digits().test_images)
    shots = digit_shots(models, images, exponent=zipf, batch=batch, seed=seed)
    load = Load(
        requests=requests, duration_s=duration, concurrency=concurrency, rate=rate, headers=credentials(base)
    )
    before = call("GET", f"{base}/admin/replicas").json()
    with progress_bar("requests") as progress:
        outcomes: list[Outcome] = run_load(
            f"{base}/predict", shots, load, lambda done: progress(done, requests)
        )
    after = call("GET", f"{base}/admin/replicas").json()

    report: dict[str, Any] = summarise(outcomes, batch)
    report["servers"] = compare_hits(report["hits"], before, after)
    report["servers"]["evictions"] = after["totals"]["evictions"] - before["totals"]["evictions"]
    report["servers"]["loads"] = after["totals"]["loads"] - before["totals"]["loads"]
    report["load"] = {
        "models": len(models),
        "zipf": zipf,
        "batch": batch,
        "seed": seed,
        "loop": "closed" if rate is None else "open",
        "concurrency": concurrency if rate is None else None,
        "rate": rate,
    }
    if plot is not None:
        from flatshare.bench.plot import plot_run

        plot_run(
            outcomes, plot, f"{len(models)} models, Zipf({zipf:g}), {report['requests_per_s']} requests/s"
        )
    if as_json:
        print_json(report)
    else:
        _print(report, plot)
    if report["errors"] == report["requests"]:
        raise typer.Exit(1)


def _models(wanted: str | None, base: str) -> list[str]:
    """Refs to send to: named ones, or the platform's tenants that have something in production."""
    if wanted is not None and not wanted.isdigit():
        return [text.strip() for text in wanted.split(",") if text.strip()]
    found = [
        one["id"] for one in call("GET", f"{base}/admin/tenants").json() if one["production"] is not None
    ]
    if not found:
        raise NotFound("the platform has no tenant with a production version; register one first")
    if wanted is not None:
        if not 1 <= int(wanted) <= len(found):
            raise InvalidInput(f"--tenants {wanted}: the platform has {len(found)} tenants in production")
        found = found[: int(wanted)]
    return found


def _print(report: dict[str, Any], plot: Path | None) -> None:
    latency = report["latency_ms"]
    load, servers = report["load"], report["servers"]
    loop = f"{load['concurrency']} at a time" if load["loop"] == "closed" else f"{load['rate']:g} a second"
    out.print(
        f"{report['requests']} requests of {load['batch']} images to {load['models']} models, "
        f"Zipf({load['zipf']:g}), {loop}, {report['seconds']:.1f} s"
    )
    print_table(
        "",
        ["requests/s#", "images/s#", "p50 ms#", "p90 ms#", "p99 ms#", "max ms#", "errors#"],
        [
            (
                report["requests_per_s"],
                report["images_per_s"],
                *(
                    "-" if latency[name] is None else f"{latency[name]:.2f}"
                    for name in ("p50", "p90", "p99", "max")
                ),
                report["errors"],
            )
        ],
    )
    for code, count in report["errors_by_code"].items():
        out.print(f"  {count} x {code}")
    out.print()
    print_table(
        "",
        ["hit rate", "client#", "servers#"],
        [
            (tier, f"{report['hit_rate'][tier]:.2%}", f"{servers['hit_rate'][tier]:.2%}")
            for tier in report["hit_rate"]
        ],
    )
    out.print(f"{servers['loads']} loads, {servers['evictions']} evictions")
    if not servers["agree"]:
        out.print(f"client and servers disagree ({report['hits']} and {servers['hits']}): {servers['why']}")
    if plot is not None:
        out.print(f"drawn: {plot}")
