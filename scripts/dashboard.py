"""Write platform/deploy/dashboard.json, the Grafana dashboard: ``.venv/bin/python scripts/dashboard.py``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

FILE = Path(__file__).parents[1] / "platform" / "deploy" / "dashboard.json"
WINDOW = "$__rate_interval"
WIDTH, HEIGHT = 8, 7


class Panel(NamedTuple):
    """A graph: its queries, each with what its lines are called."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def rate(metric: str, by: str = "") -> str:
    return f"sum by ({by}) (rate({metric}[{WINDOW}]))" if by else f"sum(rate({metric}[{WINDOW}]))"


def quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return tuple(
        (f"histogram_quantile({share}, {rate(f'{metric}_bucket', labels)})", f"p{share * 100:g}{legend}")
        for share in (0.5, 0.99)
    )


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Requests", (
        Panel("Requests by status", "reqps", ((rate("flatshare_requests_total", "status"), "{{status}}"),)),
        Panel("Refused and failed, by code", "reqps", ((rate("flatshare_request_errors_total", "code"), "{{code}}"),)),
        Panel("Answered by tier", "reqps", ((rate("flatshare_leases_total", "tier"), "{{tier}}"),)),
        Panel("Hit rate: found on the device", "percentunit", (
            (rate('flatshare_leases_total{tier="device"}') + " / " + rate("flatshare_leases_total"), "device"),
        )),
        Panel("Seconds of a request", "s", quantiles("flatshare_request_seconds")),
        Panel("p99 by tier", "s", quantiles("flatshare_request_seconds", "tier")[1:]),
        Panel("Busiest tenants", "reqps", (("flatshare_tenant_requests_per_second", "{{tenant}}"),)),
        Panel("Refused", "reqps", ((rate("flatshare_refused_requests_total", "replica"), "{{replica}}"),)),
        Panel("Under way and waiting", "short", (
            ("sum(flatshare_requests_ongoing)", "ongoing"), ("sum(flatshare_requests_queued)", "queued"),
        )),
        Panel("Images a pass", "short", (
            (rate("flatshare_rows_total") + " / " + rate("flatshare_passes_total"), "images"),
        )),
    )),
    ("Models", (
        Panel("Loads by result", "ops", ((rate("flatshare_loads_total", "result"), "{{result}}"),)),
        Panel("Seconds of a load", "s", quantiles("flatshare_load_seconds")),
        Panel("Store: calls and errors", "ops", (
            (rate("flatshare_store_requests_total"), "calls"), (rate("flatshare_store_errors_total"), "errors"),
        )),
        Panel("Device busy with passes", "percentunit", ((rate("flatshare_pass_seconds_total", "replica"), "{{replica}}"),)),
        Panel("Lag of the event loop", "s", (("flatshare_event_loop_lag_seconds", "{{replica}}"),)),
        Panel("Evictions", "ops", ((rate("flatshare_evictions_total", "replica"), "{{replica}}"),)),
        Panel("Slots in use", "percentunit", (("flatshare_slots_used / flatshare_slots", "{{replica}}"),)),
        Panel("Bytes on devices", "bytes", (
            ("flatshare_device_held_bytes", "{{replica}}"), ("flatshare_device_reserved_bytes", "{{replica}} loading"),
        )),
        Panel("Host tiers in use", "percentunit", (
            ("flatshare_host_tier_bytes / flatshare_host_tier_budget_bytes", "{{node}}"),
        )),
        Panel("Swaps of promotions", "short", (
            ("sum(flatshare_swaps_pending)", "pending"), ("sum(flatshare_swaps_failing)", "failing"),
        )),
        Panel("Quarantined slots, pinned models", "short", (
            ("sum(flatshare_quarantined_slots_total)", "quarantined"), ("sum(flatshare_pinned_models)", "pinned"),
        )),
        Panel("Models beside their homes", "short", (
            ("flatshare_copied_models", "copied"), ("flatshare_moved_models", "moved"),
        )),
    )),
    ("Fleet and edge", (
        Panel("Replicas", "short", (
            ("flatshare_replicas", "{{state}}"), ("flatshare_replicas_wanted", "wanted"),
        )),
        Panel("Answers of the edge by class", "reqps", (
            (f'sum by (code) (rate(haproxy_frontend_http_responses_total{{proxy="edge"}}[{WINDOW}]))', "{{code}}"),
        )),
        Panel("Sent again, or elsewhere, by the edge", "ops", (
            (f'sum by (proxy) (rate(haproxy_backend_retry_warnings_total{{proxy=~"pool|control"}}[{WINDOW}]))', "{{proxy}} again"),
            (f'sum by (proxy) (rate(haproxy_backend_redispatch_warnings_total{{proxy=~"pool|control"}}[{WINDOW}]))', "{{proxy}} elsewhere"),
        )),
    )),
)  # fmt: skip


def document() -> str:
    made = (
        dashboard.Dashboard("flatshare")
        .uid("flatshare")
        .tags(["flatshare"])
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    )
    for title, panels in ROWS:
        made = made.with_row(dashboard.Row(title))
        for one in panels:
            panel = timeseries.Panel().title(one.title).unit(one.unit).min(0).span(WIDTH).height(HEIGHT)
            panel = panel.datasource(DataSourceRef(type_val="prometheus", uid="${datasource}"))
            for expression, legend in one.queries:
                panel = panel.with_target(prometheus.Dataquery().expr(expression).legend_format(legend))
            made = made.with_panel(panel)
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(document())
