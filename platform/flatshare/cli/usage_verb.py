"""``flatshare usage``: what tenants used, for bills; and how versions of one tenant compare."""

from __future__ import annotations

import csv
import dataclasses
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import typer

from flatshare.cli.context import StoreOption, open_registry
from flatshare.cli.output import AsJson, out, print_json, print_table, progress_bar, size
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import InvalidInput
from flatshare_registry.ids import TenantId
from flatshare_registry.usage import Used, UsedVersion, read_usage

__all__ = ["SinceOption", "add_to", "print_comparison"]

SinceOption = Annotated[
    str, typer.Option("--since", metavar="TIME", help="90m, 24h, 7d; or a moment: 2026-11-27T08:00Z.")
]

_AGO: Final = re.compile(r"([0-9]{1,6})([mhd])", re.ASCII)
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
COUNTS: Final = ("requests", "failed", "rows", "cold_loads", "body_bytes", "seconds")


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command(rich_help_panel="Tenancy")(usage)


def usage(
    since: SinceOption = "24h",
    tenant: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    store: StoreOption = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:
    """Show what tenants used: requests, images, cold loads, bytes of bodies; from whole hours, in UTC.

    Replicas write their counts once a minute (FLATSHARE_USAGE_INTERVAL_S); a killed replica loses what it
    counted since. This verb needs only the store, and no running platform.
    """
    if as_json and as_csv:
        raise InvalidInput("--json or --csv, not both")
    begin = moment_of(since, datetime.now(UTC))
    by_tenant: dict[str, Used] = {}
    for key, used in _read(open_registry(store), begin).items():
        if tenant is None or key.tenant == TenantId(tenant):
            by_tenant.setdefault(key.tenant, Used()).add(used)
    found = sorted(by_tenant.items(), key=lambda one: (-one[1].requests, one[0]))
    rows = [{"tenant": name, **{count: getattr(used, count) for count in COUNTS}} for name, used in found]
    if as_json:
        print_json({"since": begin.isoformat(), "tenants": rows})
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, ["tenant", *COUNTS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print_table(
            "",
            ["tenant", "requests#", "failed#", "images#", "cold loads#", "bodies#", "ms a request#"],
            [
                (
                    name,
                    used.requests,
                    used.failed,
                    used.rows,
                    used.cold_loads,
                    size(used.body_bytes),
                    _ms(used),
                )
                for name, used in found
            ],
        )
        out.print(f"whole hours since {begin:%Y-%m-%d %H:00} UTC; a replica's last minute is not here yet")


def print_comparison(registry: Registry, tenant: TenantId, since: str, as_json: bool) -> None:
    """Show how a tenant's versions compare, to judge a promotion.

    Raises
    ------
    InvalidInput
        ``since`` is no time.
    """
    begin = moment_of(since, datetime.now(UTC))
    head = registry.head(tenant)
    found = {key.version: used for key, used in _read(registry, begin).items() if key.tenant == tenant}
    aliases = {number: sorted(a for a, n in head.aliases.items() if n == number) for number in found}
    if as_json:
        print_json(
            {
                "since": begin.isoformat(),
                "versions": [
                    {"version": number, "aliases": aliases[number], **dataclasses.asdict(used)}
                    for number, used in sorted(found.items())
                ],
            }
        )
        return
    classes = max((len(used.labels) for used in found.values()), default=0)
    print_table(
        "",
        ["version", "aliases", "requests#", "failed#", "ms a request#", "cold %#",
         *(f"{n}: %#" for n in range(classes))],
        [
            (
                f"{tenant}@{number}", ", ".join(aliases[number]), used.requests, used.failed, _ms(used),
                _percent(used.cold_loads, used.requests),
                *(_percent(count, used.rows) for count in _padded(used.labels, classes)),
            )
            for number, used in sorted(found.items())
        ],
    )  # fmt: skip
    out.print(f"whole hours since {begin:%Y-%m-%d %H:00} UTC; of each class, how often it was the answer")


def moment_of(text: str, now: datetime) -> datetime:
    """Parse a time as people write it: how long ago, or a moment (in UTC if it names no zone).

    Raises
    ------
    InvalidInput
        It is neither, or lies ahead.
    """
    ago = _AGO.fullmatch(text)
    if ago is not None:
        try:
            return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        except OverflowError:
            raise InvalidInput(f"{text} is longer ago than there are dates") from None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(f"{text!r} is no time; write 90m, 24h, 7d or 2026-11-27T08:00Z") from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    if moment > now:
        raise InvalidInput(f"{text} lies ahead")
    return moment


def _read(registry: Registry, begin: datetime) -> dict[UsedVersion, Used]:
    with progress_bar("reading") as update:
        return read_usage(registry.store, begin, datetime.now(UTC), update)


def _ms(used: Used) -> str:
    return f"{used.seconds / used.requests * 1e3:.1f}" if used.requests else ""


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}" if total else ""


def _padded(labels: list[int], classes: int) -> list[int]:
    return labels + [0] * (classes - len(labels))
