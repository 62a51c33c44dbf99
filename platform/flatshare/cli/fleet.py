"""Verbs that talk to a running platform: predict, replicas, scale, drain, preload, unload."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote

import typer

from flatshare.cli.answers import (
    Drained,
    DrainedNode,
    Fleet,
    Labels,
    Refreshed,
    Scaling,
    Unloaded,
    Unpinned,
    parsed,
)
from flatshare.cli.context import UrlOption, call, own_store, platform_url
from flatshare.cli.output import AsJson, err, out, print_json, print_table, size, when
from flatshare.errors import FleetUnavailable, ServeError
from flatshare_registry.errors import InvalidInput, NotFound, Unavailable
from flatshare_registry.ids import ModelRef

MODEL_ID_HEADER = "serve_multiplexed_model_id"

MOVES_S: Final = 60.0
"""Seconds for which the control plane may be away if it was on the node: it starts anew on another."""

STALLS_S: Final = 300.0
"""Seconds without progress after which a drain is reported as stuck."""

RefArgument = Annotated[str, typer.Argument(metavar="MODEL", help="acme, acme:canary or acme@7.")]

_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for function in (predict, replicas, scale, drain, preload, unpin, unload):
        app.command(rich_help_panel="Running platform")(function)


def predict(
    model: RefArgument,
    files: Annotated[
        list[Path], typer.Argument(help="PNG or JPEG images, or one JSON body.", metavar="FILE...")
    ],
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Send images, or a JSON body, to a tenant's model."""
    headers = {MODEL_ID_HEADER: str(ModelRef.parse(model))}
    try:
        contents = [(file, file.read_bytes()) for file in files]
    except OSError as error:
        raise InvalidInput(f"{error.filename} can't be read: {error.strerror}") from error
    base = platform_url(url)
    if len(files) == 1 and files[0].suffix == ".json":
        headers["content-type"] = "application/json"
        reply = call("POST", f"{base}/predict", content=contents[0][1], headers=headers)
    else:
        kinds = {file: _IMAGE_TYPES.get(file.suffix.lower()) for file in files}
        if None in kinds.values():
            raise InvalidInput("give PNG or JPEG files, or one .json file")
        parts = [("image", (file.name, data, kinds[file])) for file, data in contents]
        reply = call("POST", f"{base}/classify", files=parts, headers=headers)
    labels = parsed(reply, Labels)["predicted_label"]
    source = {
        name: reply.headers.get(f"x-flatshare-{name}")
        for name in ("tenant", "version", "digest", "tier", "replica")
    }
    if as_json:
        print_json({"predicted_label": labels, **source})
        return
    out.print(json.dumps({"predicted_label": labels}))
    out.print(
        f"answered by {source['tenant']}@{source['version']} ({str(source['digest'])[:12]}) "
        f"from {source['tier']} on {source['replica']}"
    )


def replicas(
    url: UrlOption = None,
    models: Annotated[bool, typer.Option("--models/--no-models", help="Also list every model.")] = True,
    as_json: AsJson = False,
) -> None:
    """List replicas, the models in each, and fleet totals."""
    fleet = parsed(call("GET", f"{platform_url(url)}/admin/replicas"), Fleet)
    if as_json:
        print_json(fleet)
        return
    print_fleet(fleet, models=models)


def scale(
    replicas: Annotated[
        int | None, typer.Argument(min=1, max=1000, metavar="[N]", help="So many, whatever the load.")
    ] = None,
    minimum: Annotated[int | None, typer.Option("--min", min=0, max=1000, help="Fewest.")] = None,
    maximum: Annotated[int | None, typer.Option("--max", min=1, max=1000, help="Most.")] = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Show how many replicas there should be, or change it: a number, or bounds between which load decides.

    Nothing restarts. It holds until the platform ends. With --min 0 the pool shrinks to no replica when no
    requests come, and the first request wakes it.
    """
    address = f"{platform_url(url)}/admin/scaling"
    if replicas is not None and (minimum is not None or maximum is not None):
        raise InvalidInput("give a number of replicas, or --min and --max")
    found = parsed(call("GET", address), Scaling)
    if replicas is not None:
        minimum = maximum = replicas
    if minimum is not None or maximum is not None:
        low = found["min_replicas"] if minimum is None else minimum
        high = found["max_replicas"] if maximum is None else maximum
        body = {"min_replicas": low, "max_replicas": high}
        found = parsed(call("PUT", address, json=body), Scaling)
    if as_json:
        print_json(found)
        return
    low, high = found["min_replicas"], found["max_replicas"]
    bounds = f"{low} replicas, whatever the load" if low == high else f"{low} to {high} replicas, by load"
    now = "" if found["wanted"] is None else f"; {found['wanted']} now"
    wish = "" if found["wish"] is None or low == high else f", the load wants {found['wish']}"
    out.print(f"{bounds}{now}{wish}")


def drain(
    name: Annotated[
        str,
        typer.Argument(
            metavar="REPLICA|NODE",
            help="A replica as flatshare replicas names it, or a node's address or id.",
        ),
    ],
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Empty a replica and have it replaced, or empty a whole node: models move first, no request is lost.

    The node then takes nothing more, and this can't be undone: `ray stop` it, and start Ray anew.
    """
    base = platform_url(url)
    fleet = parsed(call("GET", f"{base}/admin/replicas"), Fleet)
    replicas = {one["replica"] for one in (*fleet["replicas"], *fleet["not_answering"])}
    if name not in replicas:
        _drain_node(base, name, as_json=as_json)
        return
    with err.status(f"draining {name} ..."):
        path = f"/admin/replicas/{quote(name, safe='')}/drain"
        reply = call("POST", f"{base}{path}", timeout=70)
    done = parsed(reply, Drained)
    if as_json:
        print_json(done)
        return
    out.print(
        f"{done['replica']} has ended, {done['waited_s']:.1f} s after its last requests were sent; "
        f"others had loaded {done['handed_over']} models; its replacement starts"
    )


def _drain_node(base: str, node: str, *, as_json: bool) -> None:
    path = f"{base}/admin/nodes/{quote(node, safe='')}/drain"
    began = time.monotonic()
    with err.status(f"draining node {node} ...") as status:
        done = parsed(call("POST", path, timeout=70), DrainedNode)
        path = f"{base}/admin/nodes/{done['node_id']}/drain"  # another node may come with its address
        asked_at = fewer_at = time.monotonic()
        while done["left"]:
            status.update(f"draining node {node}: {len(done['left'])} replicas are left ...")
            try:
                now = parsed(call("POST", path, timeout=70), DrainedNode)
            except NotFound:  # a new control plane, which knows of no such node: the node has left
                done["left"] = []
            except (Unavailable, ServeError, InvalidInput):  # the control plane was there, and moves too
                if time.monotonic() - asked_at > MOVES_S:
                    raise
                time.sleep(0.5)  # nobody tells when the new one answers
            else:
                asked_at = time.monotonic()
                fewer_at = asked_at if len(now["left"]) < len(done["left"]) else fewer_at
                done["left"] = now["left"]
            if done["left"] and time.monotonic() - fewer_at > STALLS_S:
                raise FleetUnavailable(
                    f"{len(done['left'])} replicas have not left {done['address']} for {STALLS_S:.0f} s: "
                    f"{', '.join(done['left'])}. Other nodes may have no room for them: add one"
                )
        done["took_s"] = round(time.monotonic() - began, 1)
    if as_json:
        print_json(done)
        return
    out.print(
        f"node {done['address']} has no replica any more, after {done['took_s']:.1f} s; others had loaded "
        f"{done['handed_over']} models before; `ray stop` there ends it"
    )


def print_fleet(fleet: Fleet, *, models: bool) -> None:
    """The fleet as tables."""
    print_table(
        "",
        ["replica", "place#", "node", "device", "state", "slots#", "ongoing#", "queued#", "bytes#"],
        [
            (
                one["replica"],
                one["place"],
                one["node"],
                one["device"],
                one["state"],
                f"{one['slots_used']}/{one['slots']}",
                one["ongoing"],
                one["queued"],
                size(one["held_bytes"]) + (f" of {size(one['budget_bytes'])}" if one["budget_bytes"] else ""),
            )
            for one in fleet["replicas"]
        ]
        + [
            (one["replica"], "", one["node_ip"], "", one["state"], "", "", "", "")
            for one in fleet["not_answering"]
        ],
    )
    if models:
        out.print()
        print_table(
            "",
            ["replica", "model", "digest", "size#", "own#", "from", "hits#", "leases#", "last used", "held"],
            [
                (
                    one["replica"],
                    f"{model['tenant']}@{model['version']}",
                    model["digest"][:12],
                    size(model["size_bytes"]),
                    size(model["own_bytes"]),
                    model["tier"],
                    model["hits"],
                    model["leases"],
                    when(model["last_used_at"]),
                    "pinned" if model["pinned"] else model["state"],
                )
                for one in fleet["replicas"]
                for model in one["models"]
            ],
        )
    for one in fleet["replicas"]:
        for swap in one["swaps"]:
            why = f"can't be loaded: {swap['error']}" if swap["error"] else "is being loaded"
            alias = f"{swap['tenant']}:{swap['alias']}"
            out.print(
                f"{one['replica']}: {alias} is still version {swap['from_version']}: "
                f"version {swap['to_version']} {why}",
                soft_wrap=True,
            )
    for one in fleet["replicas"]:
        for load in one["failed"]:
            out.print(
                f"{one['replica']}: {load['tenant']}@{load['version']} could not be loaded at "
                f"{when(load['at'])}: {load['kind']}: {load['error']}",
                soft_wrap=True,
            )
    for node, host in {one["node"]: one["host"] for one in fleet["replicas"] if one["host"]}.items():
        out.print(f"host tier of {node}: {size(host['used_bytes'])} of {size(host['budget_bytes'])} in files")
    for one in fleet["replicas"]:
        if one["host"] is None:
            out.print(f"{one['replica']}: no host tier, every load comes from the store", soft_wrap=True)
    behind = [
        one["replica"] for one in fleet["replicas"] if one["settings_revision"] < fleet["settings_revision"]
    ]
    if behind:
        out.print(f"not yet by the settings as they were changed: {', '.join(behind)}", soft_wrap=True)
    totals = fleet["totals"]
    rates = ", ".join(f"{tier} {rate:.1%}" for tier, rate in totals["hit_rate"].items())
    loads = f"{totals['loads']} loads"
    if totals["load_ms_p50"] is not None:
        loads += f" (p50 {totals['load_ms_p50']:.1f} ms, p99 {totals['load_ms_p99']:.1f} ms)"
    out.print(
        f"\n{totals['requests']} requests: {rates}; {loads}, {totals['load_failures']} failed; "
        f"{totals['evictions']} evictions",
        soft_wrap=True,
    )
    placement = fleet["placement"]
    if placement["duplicate_factor"] is not None:
        at_home = "" if placement["at_home"] is None else f"; {placement['at_home']:.1%} of requests at home"
        copies, moved = len(placement["copies"]), len(placement["moved"])
        out.print(
            f"each model is in {placement['duplicate_factor']:.2f} replicas, so that "
            f"{placement['effective_slots']:.0f} models fit{at_home}; {copies} have copies, {moved} moved",
            soft_wrap=True,
        )


def preload(
    model: RefArgument,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it there: never evicted until `unpin`.")] = False,
    url: UrlOption = None,
) -> None:
    """Make a model resident on every replica before its first request."""
    body = {"model": str(ModelRef.parse(model)), "pin": pin}
    done = parsed(
        call("POST", f"{platform_url(url)}/admin/preload", json=body, headers=own_store()), Refreshed
    )["refreshed"]
    if not done:
        raise FleetUnavailable(f"no replica took up {model}: is one running? (flatshare replicas)")
    out.print(f"{model} is resident{' and pinned' if pin else ''} on {len(done)} replicas")


def unpin(model: RefArgument, url: UrlOption = None) -> None:
    """Let a pinned model be evicted again."""
    body = {"model": str(ModelRef.parse(model))}
    done = parsed(call("POST", f"{platform_url(url)}/admin/unpin", json=body, headers=own_store()), Unpinned)[
        "unpinned"
    ]
    out.print(f"{model} was pinned on {done} replicas")


def unload(model: RefArgument, url: UrlOption = None) -> None:
    """Free a model everywhere; it is loaded again at its next request."""
    body = {"model": str(ModelRef.parse(model))}
    done = parsed(
        call("POST", f"{platform_url(url)}/admin/unload", json=body, headers=own_store()), Unloaded
    )["unloaded"]
    out.print(f"{model} was freed on {done} replicas")
