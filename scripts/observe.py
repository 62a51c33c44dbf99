"""Prometheus beside the platform that runs here, with its metrics, alerts and the edge's own counters.

Takes the machine's ``prometheus``, or fetches Debian's package into a folder of its own. What it stores goes
when it ends. Grafana reads it as a data source; its dashboard is ``platform/deploy/dashboard.json``.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from flatshare.cli.context import credentials, platform_url
from flatshare.cli.output import err, out
from flatshare.settings import load_settings

ALERTS = Path(__file__).parents[1] / "platform" / "deploy" / "alerts.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of the platform; the one that runs here")
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus, on loopback")
    parser.add_argument("--interval", default="5s", help="between scrapes")
    options = parser.parse_args()
    url = platform_url(options.url)
    key = credentials(url).get("authorization", "").removeprefix("Bearer ")
    with tempfile.TemporaryDirectory(prefix="flatshare-observe-") as name:
        folder = Path(name)
        prometheus = program(folder)
        if prometheus is None:
            err.print(
                "error: no prometheus here, and Debian's package can't be had; see prometheus.io/download"
            )
            return 1
        (folder / "key").touch(0o600)
        (folder / "key").write_text(key)
        (folder / "prometheus.yml").write_text(
            configuration(
                url, folder / "key" if key else None, load_settings().edge_metrics_port, options.interval
            )
        )
        out.print(f"Prometheus: http://127.0.0.1:{options.port} (Ctrl-C ends it); dashboard for Grafana: platform/deploy/dashboard.json")  # fmt: skip
        command = [
            prometheus, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{options.port}", "--log.level=warn",
        ]  # fmt: skip
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends this ends Prometheus
        with subprocess.Popen(command, start_new_session=True) as running:
            try:
                return running.wait()
            except KeyboardInterrupt:
                return 0
            finally:
                running.terminate()


def configuration(url: str, key: Path | None, edge_port: int, interval: str) -> str:
    """What Prometheus is told: YAML."""
    scheme, _, host = url.rstrip("/").partition("://")
    lines = [
        f"global: {{scrape_interval: {interval}, evaluation_interval: {interval}}}",
        f"rule_files: [{ALERTS}]",
        "scrape_configs:",
        "- job_name: flatshare",
        "  metrics_path: /admin/metrics",
        f"  scheme: {scheme}",
        f"  static_configs: [{{targets: ['{host}']}}]",
    ]
    if key is not None:
        lines.append(f"  authorization: {{credentials_file: {key}}}")
    if edge_port:
        lines += ["- job_name: flatshare-edge", f"  static_configs: [{{targets: ['127.0.0.1:{edge_port}']}}]"]
    return "\n".join(lines) + "\n"


def program(folder: Path) -> str | None:
    """Path of Prometheus; None where it can't be had."""
    if (found := shutil.which("prometheus")) is not None:
        return found
    if shutil.which("apt-get") is None:
        return None
    err.print("fetching Debian's prometheus")
    if subprocess.run(
        ["apt-get", "download", "-q", "prometheus"], cwd=folder, stdout=subprocess.DEVNULL
    ).returncode:
        return None
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
    return str(folder / "usr/bin/prometheus")


if __name__ == "__main__":
    sys.exit(main())
