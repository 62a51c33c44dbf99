"""Settings of the platform: read once at the root of a program, passed down as arguments.

Every field can be set as ``FLATSHARE_<NAME>``; command-line options win over the environment.
Contradictory settings are refused here, before anything starts. Long, because it is a table: each setting
with what it means, and then what must agree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import ip_network
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from pydantic_settings import SettingsError as BadSource

from flatshare.access_log import log_target
from flatshare.callback_rules import CallbackRules
from flatshare.errors import SettingsError
from flatshare.process_log import LogFormat, LogLevel
from flatshare.telemetry.exporting import check_endpoint
from flatshare_registry.records import Quotas
from flatshare_registry.settings import RegistrySettings
from flatshare_registry.stores.s3 import S3Options

__all__ = ["LOOPBACK_HOSTS", "Settings", "StepSettings", "load_settings", "settings_of", "unknown_variables"]

LOOPBACK_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,39}", re.ASCII)
_SCHEMES: Final = {"redis": ("redis", "rediss"), "rabbitmq": ("amqp", "amqps")}
_IN_A_HEADER: Final = re.compile(r"[!-~]*", re.ASCII)


class StepSettings(BaseModel):
    """How one pipeline's step is served; frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str = Field(
        default="", description='Its class, "module:Class"; empty: the installed one of the pipeline\'s name.'
    )
    min_replicas: int = Field(default=1, ge=0, le=1000)
    max_replicas: int = Field(default=1, ge=1, le=1000)
    target_ongoing_requests: float = Field(default=2.0, gt=0)
    upscale_delay_s: float = Field(default=2.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    cpus_per_replica: float = Field(default=0.5, ge=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    max_ongoing_requests: int = Field(default=16, ge=1)
    max_queued_requests: int = Field(
        default=256, ge=-1, description="In each replica of the pool; beyond it 503. -1: no bound."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})"
            )
        return self


class Settings(RegistrySettings):
    """All settings of a platform; frozen."""

    # -- addresses
    host: str = Field(
        default="127.0.0.1",
        description="Address that the edge listens on. With auth=off only loopback.",
    )
    port: int = Field(default=8000, ge=1, le=65535, description="Port of the edge: both planes.")
    serve_port: int = Field(
        default=8500,
        ge=1,
        le=65535,
        description="Port of Ray Serve's own proxy, on loopback: the edge's fallback while no replica is up.",
    )
    edge: Literal["haproxy", "serve"] = Field(
        default="haproxy",
        description="haproxy: our HAProxy configuration, one hop. serve: Ray Serve's Python proxy with our "
        "router; several times slower, needs no extra process.",
    )

    tls_cert: str = Field(
        default="",
        description="PEM file of certificate chain and private key; TLS ends at the edge. Empty: plain HTTP.",
    )
    log_format: LogFormat = Field(
        default="text",
        description="How the platform's own processes log, on stderr: text, or json (a line each record).",
    )
    log_level: LogLevel = Field(default="WARNING", description="Least of what they log.")

    edge_metrics_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port on loopback where the edge's own counters (HAProxy's exporter, `/metrics`) can be "
        "read. 0: none.",
    )

    access_log: str = Field(
        default="off",
        description="A line of JSON for each request, written by the edge: a file to add it to (rotate it "
        "with copytruncate), or udp://host:port of who takes them. off: none.",
    )
    traces: str = Field(
        default="off",
        description="Where spans of sampled requests go: http://host:4318 of a collector that takes "
        "OpenTelemetry's OTLP over HTTP. off: none are recorded. Needs the extra `traces`.",
    )
    trace_ratio: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Part of the requests that the edge samples for traces, by dice: a caller's own "
        "`traceparent` joins them to its trace, and can't switch them on.",
    )
    max_connections_per_address: int = Field(
        default=1024,
        ge=1,
        description="Connections that the edge takes from one address at a time; more are closed at once. "
        "Not from trusted_proxies.",
    )
    trusted_proxies: str = Field(
        default="",
        description="Addresses or networks of load balancers before the edge, with commas between. What they "
        "append to X-Forwarded-For is the client's address, for limits by address.",
    )

    trust_ray_network: bool = Field(
        default=False,
        description="Listen beyond loopback although the Ray cluster asks callers for no token: who reaches "
        "its ports can run code on it, so a firewall must keep others out.",
    )

    nodes: Literal["one", "several"] = Field(
        default="one",
        description="several: replicas are on several Ray nodes and listen on their nodes' addresses, so "
        "that edges of other nodes reach them; a firewall must keep everybody else out. one: on loopback.",
    )

    peer_tiers: bool = Field(
        default=True,
        description="With nodes=several: ask other nodes' host tiers for weights before the store. They are "
        "asked on the replicas' doors, with a key of the cluster's own.",
    )

    metrics_tenants: int = Field(
        default=20,
        ge=0,
        le=50,
        description="Tenants that `GET /admin/metrics` names, the busiest of the last minute. 0: none.",
    )
    ray_metrics: bool = Field(
        default=False,
        description="Tell a few counters to `ray.serve.metrics` too, every ten seconds: for who collects "
        "from Ray's agents already.",
    )
    usage_interval_s: float = Field(
        default=60.0,
        ge=0,
        le=60,
        description="Seconds between the writes of what tenants used (`flatshare usage`); a replica that is "
        "killed loses what it counted since. 0: nothing is written.",
    )

    # -- who may call
    auth: Literal["on", "off"] = Field(
        default="on", description="off: everybody who reaches the port is the operator. For trying things."
    )
    admin_key: SecretStr = Field(
        default=SecretStr(""),
        description="The operator's key for both planes. Empty: made at the first `up` and kept in a file.",
    )
    viewer_key: SecretStr = Field(
        default=SecretStr(""), description="The same for a key that may only look at the control plane."
    )
    api_key: SecretStr = Field(
        default=SecretStr(""), description="What client commands show; by default the admin key's file."
    )
    key_trust_s: float = Field(
        default=3600.0,
        gt=0,
        description="Seconds for which a replica that can't reach the store believes the keys that it knows; "
        "then their requests get 503. A revocation is told to every replica, with or without the store.",
    )
    erasure_key_file: str = Field(
        default="",
        description="File of the Ed25519 key that signs erasure records, on the control plane's node; made "
        "when missing. Empty: beside the admin key.",
    )
    jwt_issuer: str = Field(
        default="",
        description="Also take JSON Web Tokens of this issuer (their `iss`). Empty: only API keys.",
    )
    jwt_audience: str = Field(default="flatshare", description="What a token's `aud` must be.")
    jwt_jwks: str = Field(default="", description="The issuer's public keys: an https:// URL or a file.")
    jwt_tenant_claim: str = Field(default="tenant", description="The claim that names the tenant.")
    jwt_scope_claim: str = Field(
        default="scope", description="The claim that lists scopes: predict, manage, or both."
    )

    # -- how much each may use
    plans: dict[str, Quotas] = Field(
        default_factory=dict,
        description='Limits by plan, as JSON: {"default": {"requests_per_s": 50, "resident_bytes": 5e7}}. '
        "What is left out has no limit of its own.",
    )

    # -- the pool
    replicas: int = Field(
        default=2,
        ge=1,
        le=1000,
        description="Replicas in the pool when it starts; always, without the next two.",
    )
    min_replicas: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Fewest replicas: the pool shrinks to it when there is little to do. 0: to none, and the "
        "first request wakes it. Unset: `replicas`.",
    )
    max_replicas: int | None = Field(
        default=None, ge=1, le=1000, description="Most replicas: the pool grows to it. Unset: `replicas`."
    )
    target_ongoing_requests: float = Field(
        default=4.0,
        gt=0,
        description="Requests in a pass, or waiting for one, that a replica should have: of all models, "
        "for the number of replicas; of one model, for its copies.",
    )
    upscale_delay_s: float = Field(
        default=2.0, ge=0, description="Seconds for which more replicas must be wanted before some are added."
    )
    downscale_delay_s: float = Field(
        default=60.0, ge=0, description="Seconds for which fewer must be wanted before some go."
    )
    warm_up_s: float = Field(
        default=8.0,
        ge=0,
        le=60,
        description="Seconds for which a replica that starts loads what it will be home to before it takes "
        "requests. 0: it starts cold.",
    )
    downscale_to_zero_delay_s: float = Field(
        default=300.0, gt=0, description="Seconds without a request before the last replica goes."
    )
    slots: int = Field(
        default=10, ge=1, le=100_000, description="Models that one replica keeps on its device."
    )
    device_bytes: int = Field(
        default=0,
        ge=0,
        description="Bytes that one replica's models may take on its device. 0: on CUDA what is free but for "
        "the headroom, on CPU no bound but the slots.",
    )
    device_headroom_bytes: int = Field(
        default=1024**3,
        ge=0,
        description="Bytes of a CUDA device that are left for activations when device_bytes is 0.",
    )
    eviction: Literal["lru", "sieve"] = Field(
        default="lru",
        description="Who is evicted first. sieve keeps models that are used again from being driven out by a "
        "scan of models that are used once.",
    )
    host_dir: str = Field(
        default="auto",
        description="Folder of the host tier, shared by a node's replicas; tmpfs is best. {node} in it is "
        "the node's address. auto: /dev/shm/flatshare-<uid> where there is a /dev/shm, else the temporary "
        "folder. off: none.",
    )
    host_bytes: int = Field(
        default=0,
        ge=0,
        description="Bytes that a node's host tier may take. 0: a quarter of its file system, at most 8 GiB.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="auto: cuda where gpus_per_replica is above 0 or there is one, else cpu. A GPU that is "
        "reserved and can't be used is an error, not a reason for cpu.",
    )
    gpus_per_replica: float = Field(
        default=0.0,
        ge=0,
        description="GPUs that Ray reserves for one replica: 1, or a fraction that it shares with others. "
        "0 on machines without CUDA; device=cuda needs more than 0.",
    )
    cpus_per_replica: float = Field(
        default=1.0, ge=0, description="CPUs that Ray reserves for one replica (bookkeeping, no limit)."
    )
    torch_threads: int = Field(
        default=0,
        ge=0,
        description="Threads of one forward pass. 0: what was measured best for the model's architecture.",
    )
    max_ongoing_requests: int = Field(
        default=64, ge=1, description="Requests that one replica works on at a time; more wait."
    )
    max_queued_requests: int = Field(
        default=256, ge=0, description="Requests that wait in one replica; beyond it 503 with Retry-After."
    )
    tenant_share: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Part of a replica's places, waiting ones included, that one tenant may have at a time "
        "where neither its quotas nor its plan say concurrent_requests.",
    )
    request_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds that a request may take in a replica, waiting included."
    )
    fetch_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds that the store may take to deliver one version; then the request gets 503.",
    )
    load_concurrency: int = Field(
        default=4, ge=1, le=64, description="Models that one replica loads at a time."
    )
    fetch_concurrency: int = Field(
        default=8,
        ge=1,
        le=128,
        description="Ranged GETs of large weights that one replica runs at a time, over all loads.",
    )
    max_batch_rows: int = Field(
        default=64,
        ge=1,
        description="Rows at which a forward pass is full. 64 suits a CPU core's cache; a GPU takes more.",
    )
    stack_models: bool = Field(
        default=False,
        description="Run models of one architecture that share no layer in one pass, with their weights "
        "stacked. For GPUs, small networks and many tenants; DESIGN.md has figures.",
    )
    view_ttl_s: float = Field(
        default=5.0,
        gt=0,
        description="Seconds that a replica believes what it read of a tenant; a promote through the "
        "control plane is seen at once.",
    )

    pipelines: dict[str, StepSettings] = Field(
        default_factory=dict,
        description="Pipelines that are served beside the pool, by name, as JSON: "
        '{"images": {"max_replicas": 3}}. Each has a step of its own resources that runs before the model.',
    )

    # -- tasks
    tasks: Literal["off", "embedded", "redis", "rabbitmq"] = Field(
        default="off",
        description="embedded: take requests to be answered later (`POST /tasks`), with a queue in a file of "
        "this machine. redis, rabbitmq: with one in Redis or Valkey, or in RabbitMQ. off: none.",
    )
    tasks_broker_url: str = Field(
        default="",
        description="Of the queue, without a password: redis://host:port/number, "
        "amqp://user@host:port/vhost; rediss:// or amqps:// with TLS.",
    )
    tasks_broker_password_file: str = Field(
        default="", description="File with its password, on every node. Empty: none."
    )
    tasks_file: str = Field(
        default="",
        description="The embedded queue's file. Empty: beside the admin key. What it loses is in the store.",
    )
    tasks_at_a_time: int = Field(
        default=4, ge=1, le=1000, description="Tasks that one consumer runs at a time."
    )
    tasks_min_consumers: int = Field(
        default=1, ge=0, le=1000, description="Fewest processes that run tasks. 0: none while no task waits."
    )
    tasks_max_consumers: int = Field(
        default=4, ge=1, le=1000, description="Most of them: more come when many tasks wait, or old ones."
    )
    tasks_queued: int = Field(default=10_000, ge=1, description="Tasks that may wait; beyond it 503.")
    tasks_queued_per_tenant: int = Field(
        default=1000, ge=1, description="Tasks of one tenant that may wait; beyond it 429."
    )
    tasks_keep_s: float = Field(
        default=24 * 3600.0,
        gt=0,
        description="Seconds after which a task that has ended is removed, with its answer.",
    )

    tasks_max_body_bytes: int = Field(
        default=64 * 1024**2,
        ge=1024,
        le=64 * 1024**2,
        description="Longest input of a task, sent or stored; JSON may have max_body_bytes.",
    )
    tasks_max_rows: int = Field(
        default=4096,
        ge=1,
        description="Most images in one task; they run in passes of max_batch_rows, all of them within "
        "request_timeout_s.",
    )
    tasks_callback_hosts: str = Field(
        default="",
        description="Who may be told of a task's end (x-task-callback), with commas between: hooks.acme.com, "
        "*.acme.com, * (by https, at public addresses), or http://10.0.0.5:8080, whatever its address. "
        "Empty: nobody.",
    )

    # -- limits on what comes in
    max_body_bytes: int = Field(
        default=8 * 1024**2, ge=1024, description="Longest request body, in bytes; beyond it 413."
    )
    body_memory_bytes: int = Field(
        default=512 * 1024**2,
        ge=1024**2,
        description="Bytes of long bodies and their rows that one replica holds at a time; beyond it 503, "
        "and 429 for a tenant whose own take more than tenant_share of it.",
    )
    max_rows: int = Field(default=1024, ge=1, description="Most images in one request; beyond it 413.")
    retry_body_bytes: int = Field(
        default=64 * 1024,
        ge=4096,
        le=1024**2,
        description="Longest body that the edge sends again when a replica dies under it. Each open "
        "request costs the edge about twice this in memory.",
    )

    # -- clients
    url: str = Field(
        default="",
        description="Address of a running platform, for client commands; by default what `up` wrote.",
    )

    @property
    def least_replicas(self) -> int:
        """The fewest that the pool may have."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most_replicas(self) -> int:
        """The most that the pool may have."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def default_quotas(self) -> Quotas:
        """What a tenant may use of one replica where neither its quotas nor its plan say."""
        places = self.max_ongoing_requests + self.max_queued_requests
        return Quotas(concurrent_requests=max(int(places * self.tenant_share), 1))

    @field_validator("admin_key", "viewer_key", "api_key")
    @classmethod
    def _fit_for_a_header(cls, key: SecretStr) -> SecretStr:
        """A newline at the end is cut off; what else no header takes is refused, and not shown."""
        text = key.get_secret_value().strip()
        if _IN_A_HEADER.fullmatch(text) is None:
            raise ValueError(
                "has a character that no key has: white space within, a control code, or not ASCII"
            )
        return SecretStr(text)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.port == self.serve_port:
            raise ValueError(f"port and serve_port are both {self.port}; give them different ports")
        if self.gpus_per_replica > 1:
            raise ValueError(
                "gpus_per_replica is at most 1: a replica runs on one GPU. For more GPUs set more replicas"
            )
        if self.device == "cuda" and self.gpus_per_replica == 0:
            raise ValueError("device=cuda needs gpus_per_replica above 0, or Ray gives the replica no GPU")
        if self.device == "cpu" and self.gpus_per_replica > 0:
            raise ValueError("device=cpu with gpus_per_replica above 0 would reserve GPUs and not use them")
        if not self.least_replicas <= self.replicas <= self.most_replicas:
            raise ValueError(
                f"replicas ({self.replicas}) is not between min_replicas ({self.least_replicas}) and "
                f"max_replicas ({self.most_replicas})"
            )
        if self.least_replicas == 0 and self.edge == "serve":
            raise ValueError(
                "min_replicas=0 needs edge=haproxy: nothing else sees the request that wakes the pool"
            )
        if (self.tasks in _SCHEMES) != bool(self.tasks_broker_url):
            raise ValueError("tasks=redis or tasks=rabbitmq, and tasks_broker_url, go together")
        if self.tasks != "off" and self.tasks_max_body_bytes < self.max_body_bytes:
            raise ValueError("tasks_max_body_bytes is less than max_body_bytes")
        if self.tasks != "off" and self.body_memory_bytes < 4 * self.tasks_max_body_bytes:
            raise ValueError("body_memory_bytes is less than four bodies of tasks_max_body_bytes")
        if self.tasks_min_consumers > self.tasks_max_consumers:
            raise ValueError(
                f"tasks_min_consumers ({self.tasks_min_consumers}) is above tasks_max_consumers "
                f"({self.tasks_max_consumers})"
            )
        if self.tasks_broker_url:
            parts, schemes = urlsplit(self.tasks_broker_url), _SCHEMES[self.tasks]
            if parts.scheme not in schemes or not parts.hostname:
                raise ValueError(f"tasks_broker_url is not {schemes[0]}://host:port/…")
            if parts.password is not None:
                raise ValueError("tasks_broker_url holds a password: put it into tasks_broker_password_file")
        try:
            CallbackRules.parse(self.tasks_callback_hosts)
        except ValueError as error:
            raise ValueError(f"tasks_callback_hosts: {error}") from error
        for name in self.pipelines:
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"pipeline {name[:80]!a}: a name is 1 to 40 of a-z, 0-9 and -")
        if self.retry_body_bytes > self.max_body_bytes:
            raise ValueError("retry_body_bytes is larger than max_body_bytes")
        if self.body_memory_bytes < 4 * self.max_body_bytes:
            raise ValueError("body_memory_bytes is less than four bodies of max_body_bytes")
        if self.host not in LOOPBACK_HOSTS and self.auth == "off":
            raise ValueError(
                f"host {self.host!a} is not loopback, and auth=off lets everybody in: use auth=on"
            )
        if self.host not in LOOPBACK_HOSTS and self.edge == "serve":
            raise ValueError("edge=serve listens on loopback only; edge=haproxy takes other addresses")
        if self.nodes == "several" and (self.auth == "off" or self.edge == "serve"):
            raise ValueError("nodes=several needs auth=on and edge=haproxy: replicas listen beyond loopback")
        if self.tls_cert and self.edge == "serve":
            raise ValueError("tls_cert needs edge=haproxy")
        if self.access_log != "off" and self.edge == "serve":
            raise ValueError("access_log needs edge=haproxy")
        log_target(self.access_log)
        if self.traces != "off":
            if self.edge == "serve":
                raise ValueError("traces needs edge=haproxy: else callers say what is sampled")
            check_endpoint(self.traces)
        if self.proxy_networks() and self.edge == "serve":
            raise ValueError("trusted_proxies needs edge=haproxy")
        if bool(self.jwt_issuer) != bool(self.jwt_jwks):
            raise ValueError("jwt_issuer and jwt_jwks go together")
        return self

    @property
    def s3_options(self) -> S3Options:
        """The S3 part as one value; with traces, calls to the store are part of them."""
        if self.traces == "off":
            return super().s3_options
        try:
            from flatshare.telemetry.tracing import watch_s3
        except ImportError:  # a light install: nothing there is part of a trace
            return super().s3_options
        return replace(super().s3_options, watch=watch_s3)

    def proxy_networks(self) -> tuple[str, ...]:
        """``trusted_proxies``, one by one; raises ``ValueError`` for what is no network."""
        names = [name for part in self.trusted_proxies.split(",") if (name := part.strip())]
        try:
            return tuple(str(ip_network(name, strict=False)) for name in names)
        except ValueError as error:
            raise ValueError(f"trusted_proxies: {error}") from error


class _GivenSettings(Settings):
    """Settings of arguments alone: of a dictionary in the environment nothing is mixed in."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Called by pydantic."""
        return (init_settings,)


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Settings of all these values, whatever this process's environment says.

    Raises
    ------
    ValidationError
        They contradict each other.
    """
    return Settings.model_construct(**dict(_GivenSettings(**values)))


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by those of ``given`` that are not None.

    Raises
    ------
    SettingsError
        With one line a problem.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except BadSource as error:  # what should be JSON is not
        named = re.search(r'field "(\w+)"', str(error))
        name = f"FLATSHARE_{named[1].upper()}" if named else "a FLATSHARE_ variable"
        raise SettingsError(f"{name} is not JSON: {error.__cause__}") from None
    except ValidationError as error:
        lines = [
            f"{_source(problem['loc'], given)}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_input=False)
        ]
        raise SettingsError("; ".join(lines)) from None


def _source(place: tuple[int | str, ...], given: Mapping[str, object]) -> str:
    """A setting's name, and its variable's where it was not given as an option."""
    if not place:
        return "settings"
    name = str(place[0])
    variable = "" if given.get(name) is not None else f" (FLATSHARE_{name.upper()})"
    return ".".join(str(part) for part in place) + variable


PREFIX: Final = "FLATSHARE_"
_INTERNAL: Final = frozenset({"READY_FD", "UP_LOG"})
"""What ``up --detach`` tells its child."""


def unknown_variables(environment: Iterable[str]) -> dict[str, str | None]:
    """Names of variables that look like settings and are none, and the setting that was meant, perhaps."""
    known = {name.upper() for name in Settings.model_fields}
    found: dict[str, str | None] = {}
    for name in sorted(environment):
        rest = name.upper().removeprefix(PREFIX)
        if name.upper().startswith(PREFIX) and rest not in known | _INTERNAL:
            near = difflib.get_close_matches(rest, known, 1, 0.7)
            found[name] = f"{PREFIX}{near[0]}" if near else None
    return found
