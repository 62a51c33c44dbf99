"""``flatshare bench``: load against a running platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from flatshare.cli.answers import Fleet, Tenant, parsed
from flatshare.cli.context import UrlOption, call, credentials, need_mnist, platform_url
from flatshare.cli.output import AsJson, err, out, print_json, print_table, progress_bar
from flatshare.errors import Forbidden, ServeError, Unauthenticated
from flatshare_registry.errors import InvalidInput, NotFound, RegistryError
from flatshare_registry.ids import ModelRef
from flatshare_registry.keys import parse_key

PLOT_SUFFIXES: Final = (".png", ".svg", ".pdf")


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command(rich_help_panel="Running platform")(bench)


def bench(
    tenants: Annotated[
        str | None,
        typer.Option(
            help="Refs to send to: acme,globex:canary. By default all tenants in production, the tenants of "
            "--keys, or the tenant whose key FLATSHARE_API_KEY is."
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Only the first N of them.")] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, one a line, each shown for its own tenant: limits and refusals are then "
            "each tenant's own, not the operator's."
        ),
    ] = None,
    zipf: Annotated[float, typer.Option(min=0, help="Exponent of popularity; 0 is all alike.")] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Stop after this many.")] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Stop after this many seconds.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1000, help="Closed loop: requests in flight.")] = 16,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Open loop: requests a second.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in one request.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed for drawing tenants and images.")] = 0,
    max_errors: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that may fail; more is exit code 1.")
    ] = 0.01,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Replay this CSV (time, tenant) at its own times; its tenants must exist. --concurrency "
            "has no effect."
        ),
    ] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="With --trace: this many times as fast.")] = 1.0,
    record: Annotated[
        Path | None, typer.Option(help="Write what was sent as such a CSV, for --trace and for plan.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the run into this PNG.")] = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Send real digits to a running platform; report throughput, latency, errors and hit rates.

    Hit rates are shown as the client saw them (reply headers) and as the servers counted them, where the
    key may ask. Exit code 1 when more than --max-errors failed, or not one request was answered.
    """
    need_mnist()
    from flatshare.bench.load import Load, Outcome, run_load
    from flatshare.bench.report import summarise
    from flatshare.bench.workload import digit_shots
    from flatshare.mnist.digits import load_digits
    from flatshare.models.architecture import architecture
    from flatshare.simulation.trace import read_trace, write_trace

    if plot is not None and (plot.suffix not in PLOT_SUFFIXES or not plot.parent.is_dir()):
        raise InvalidInput(f"--plot {plot}: name a {', '.join(PLOT_SUFFIXES)} file in a folder that exists")
    if record is not None and not record.parent.is_dir():
        raise InvalidInput(f"--record {record}: name a file in a folder that exists")
    base = platform_url(url)
    shown = credentials(base)
    own = {} if keys is None else _read_keys(keys)
    before = _snapshot(base)
    recorded = None if trace is None else read_trace(trace)
    if recorded is not None and (tenants or count or rate):
        raise InvalidInput("--trace says who is asked for and when: leave --tenants, --count and --rate out")
    models = list(recorded.names) if recorded else _models(tenants, count, base, own, shown)
    if requests is None and duration is None and recorded is None:
        duration = 10.0
    images = architecture("mnist-cnn").preprocess(load_digits().test_images)
    headers = {model: _header_of(model, own) for model in models}
    shots = digit_shots(
        models, images, exponent=zipf, batch=batch, seed=seed, headers=headers,
        order=recorded.models.tolist() if recorded else None,
    )  # fmt: skip
    load = Load(
        requests=requests, duration_s=duration, concurrency=concurrency, rate=rate, headers=shown,
        at_s=(recorded.at_s / speed).tolist() if recorded else None,
    )  # fmt: skip
    requests = len(recorded) if recorded and requests is None else requests
    with progress_bar("requests") as progress:
        outcomes: list[Outcome] = run_load(
            f"{base}/predict", shots, load, lambda done: progress(done, requests)
        )

    report: dict[str, Any] = summarise(outcomes, batch)
    _add_servers(report, before, before if isinstance(before, str) else _snapshot(base, late=True))
    report["load"] = {
        "models": len(models),
        "zipf": zipf if recorded is None else None,
        "batch": batch,
        "seed": seed,
        "loop": "trace" if recorded else "closed" if rate is None else "open",
        "concurrency": concurrency if rate is None and recorded is None else None,
        "rate": rate,
    }
    if as_json:
        print_json(report)
    else:
        _print(report)
    if record is not None:  # after the report, as the picture
        write_trace(record, sorted((one.at_s, one.model) for one in outcomes))
    if plot is not None:  # after the report: a full disk must not cost the run
        from flatshare.bench.plot import plot_run

        kind = f"Zipf({zipf:g})" if trace is None else trace.name
        about = f"{len(models)} models, {kind}, {report['requests_per_s']} requests/s"
        plot_run(outcomes, plot, about)
        if not as_json:
            out.print(f"drawn: {plot}", soft_wrap=True)
    _judge(report, max_errors)


def _judge(report: dict[str, Any], max_errors: float) -> None:
    """Exit with 1 when too much failed."""
    errors, requests = report["errors"], report["requests"]
    held_back = report["errors_by_code"].get("too_many_refusals", 0)
    if held_back:
        err.print(
            f"the edge held back {held_back} requests of a key that was refused too often: with --keys each "
            "tenant's own key is shown",
            soft_wrap=True,
        )
    if errors == requests:
        err.print("not one request was answered")
        raise typer.Exit(1)
    if errors > max_errors * requests:
        err.print(f"{errors / requests:.2%} of the requests failed; --max-errors allows {max_errors:.2%}")
        raise typer.Exit(1)


def _read_keys(file: Path) -> dict[str, str]:
    """API keys by tenant. No error shows a line of the file."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--keys {file} can't be read: {getattr(error, 'strerror', 'not text')}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            tenant = _tenant_of(line)
            if tenant is None:
                raise InvalidInput(f"--keys {file}: line {number} is not a tenant's API key")
            found[tenant] = line
    if not found:
        raise InvalidInput(f"--keys {file}: there is no key in it")
    return found


def _tenant_of(key: str) -> str | None:
    """The tenant whose API key this is; None for an operator's key, and for what is no key."""
    try:
        return parse_key(key).tenant
    except InvalidInput:
        return None


def _header_of(model: str, keys: dict[str, str]) -> tuple[tuple[str, str], ...]:
    key = keys.get(ModelRef.parse(model).tenant)
    return () if key is None else (("authorization", f"Bearer {key}"),)


def _models(
    wanted: str | None, count: int | None, base: str, keys: dict[str, str], shown: dict[str, str]
) -> list[str]:
    """Refs to send to: named ones, those of the keys, or tenants that have something in production."""
    if wanted is not None:
        found = [str(ModelRef.parse(text.strip())) for text in wanted.split(",") if text.strip()]
        if not found:
            raise InvalidInput("--tenants names none")
    elif keys:
        found = sorted(keys)
    else:
        found = _in_production(base, shown)
    if count is not None and count > len(found):
        raise InvalidInput(f"--count {count}: there are {len(found)} to send to")
    found = found[:count]
    missing = [one for one in found if keys and not shown and ModelRef.parse(one).tenant not in keys]
    if missing:
        raise InvalidInput(f"--keys has no key for {', '.join(missing)}, and FLATSHARE_API_KEY is not set")
    return found


def _in_production(base: str, shown: dict[str, str]) -> list[str]:
    """All tenants in production, if the key may list tenants; for a tenant's key, that tenant."""
    try:
        tenants = parsed(call("GET", f"{base}/admin/tenants"), list[Tenant])
    except Forbidden:
        tenant = _tenant_of(shown.get("authorization", "").removeprefix("Bearer "))
        if tenant is None:
            raise InvalidInput("this key may not list tenants: name yours with --tenants") from None
        return [tenant]
    found = [one["id"] for one in tenants if one["production"] is not None]
    if not found:
        raise NotFound("the platform has no tenant with a production version; register one first")
    return found


def _snapshot(base: str, *, late: bool = False) -> Fleet | str:
    """The fleet, or why it is not known: this key may not ask, or, after a run, it does not answer."""
    try:
        return parsed(call("GET", f"{base}/admin/replicas"), Fleet)
    except (Forbidden, Unauthenticated) as error:
        return f"this key may not look at the fleet ({error.message})"
    except (ServeError, RegistryError) as error:
        if not late:
            raise
        return error.message


def _add_servers(report: dict[str, Any], before: Fleet | str, after: Fleet | str) -> None:
    """Add what the servers counted; None, and why, where that is not known."""
    from flatshare.bench.report import compare_hits

    if isinstance(before, str) or isinstance(after, str):
        report["servers"] = None
        report["servers_unknown"] = before if isinstance(before, str) else after
        return
    report["servers"] = compare_hits(report["hits"], before, after)
    then, now = before["totals"], after["totals"]
    report["servers"]["evictions"] = now["evictions"] - then["evictions"]
    report["servers"]["loads"] = now["loads"] - then["loads"]


def _print(report: dict[str, Any]) -> None:
    latency = report["latency_ms"]
    load, servers = report["load"], report["servers"]
    if load["loop"] == "trace":
        loop = "at the trace's times"
    else:
        pace = (
            f"{load['concurrency']} at a time" if load["loop"] == "closed" else f"{load['rate']:g} a second"
        )
        loop = f"Zipf({load['zipf']:g}), {pace}"
    out.print(
        f"{report['requests']} requests of {load['batch']} images to {load['models']} models, "
        f"{loop}, {report['seconds']:.1f} s"
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
            (tier, f"{report['hit_rate'][tier]:.2%}", f"{servers['hit_rate'][tier]:.2%}" if servers else "-")
            for tier in report["hit_rate"]
        ],
    )
    if not servers:
        out.print(f"the servers' counts are not known: {report['servers_unknown']}", soft_wrap=True)
        return
    out.print(f"{servers['loads']} loads, {servers['evictions']} evictions")
    if not servers["agree"]:
        out.print(f"client and servers disagree ({report['hits']} and {servers['hits']}): {servers['why']}")
