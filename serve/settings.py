"""What `limelight serve` can be told, in one schema: by flags, by the environment, or in a TOML file, in this order.

A field here is a flag (`--queue-tokens`), a variable (`LIMELIGHT_SERVE_QUEUE_TOKENS`) and a key (`queue_tokens`). What
none of them sets is as this file has it; what is unknown in any of them is refused.
"""

import difflib
import inspect
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from annotated_types import Ge, Le
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from model.config import Frozen, describe
from model.errors import ConfigError
from serve.connections import ConnectionLimits
from serve.jobs import EngineLimits
from serve.logs import Format, Level
from serve.security import Security
from serve.server import LOOPBACK, ServerOptions

PREFIX = "LIMELIGHT_SERVE_"
"""Of the variables."""

SERVICE_LINK = re.compile(
    rf"(?P<service>{PREFIX[:-1]}(?:_.+?)??)_"
    r"(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?|(?P<port>PORT))"
)
"""Variables that Kubernetes puts into every container of a namespace, for a Service whose name begins like ours."""

SHORT = {"port": "-p"}
"""Flags that have a short form too."""

LIMITS = EngineLimits()
CONNECTIONS = ConnectionLimits()

LONGEST = 24 * 24 * 3600.0
"""Seconds, of a setting of connections: gRPC counts their milliseconds in 32 bits, so 24 days are the most."""


class Settings(Frozen):
    """All of it. A docstring is what `--help` says."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 for every network."""
    port: int = Field(default=50051, ge=0, le=65535)
    """Port; 0 takes a free one."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes; auto takes CUDA where there is a device."""
    precision: Literal["fp32", "int8", "fp16"] | None = None
    """Of the weights; by default fp16 on CUDA if the bundle has it (export --fp16), else fp32."""
    threads: int | None = Field(default=None, ge=1)
    """Threads that compute; by default as affinity and quota allow."""
    queue: int = Field(default=LIMITS.queue, ge=1)
    """Most requests waiting; one more is refused."""
    client_queue: int | None = Field(default=LIMITS.client_queue, ge=1)
    """Most of them of one client; by default seven eighths of the queue."""
    client_header: str | None = Field(default=None, pattern="^[a-z0-9._-]+$")
    """Metadata key that tells clients apart, set by your proxy; by default it is the address."""
    queue_tokens: int = Field(default=LIMITS.queue_tokens, ge=1)
    """Most tokens that requests waiting can come to keep."""
    queue_bytes: int = Field(default=LIMITS.queue_bytes, ge=1)
    """Most bytes of requests waiting."""
    rows: int = Field(default=LIMITS.rows, ge=1)
    """Most rows (sentences times beams) decoded together."""
    encode_tokens: int = Field(default=LIMITS.encode_tokens, ge=1)
    """Most padded source tokens read between two decoder steps."""
    tokens: int = Field(default=LIMITS.tokens, ge=1)
    """Most tokens, over all rows, that keys and values are kept of."""
    attention: int = Field(default=LIMITS.attention, ge=1)
    """Most weights of one attention head kept for answers under way."""
    call_seconds: float = Field(default=LIMITS.call_seconds, ge=0, allow_inf_nan=False)
    """Several steps go into one call that ends in this time; 0 takes single steps."""
    grace: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that calls in flight have when stopping."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port for Prometheus' scrapes; none if left out."""
    metrics_host: str | None = Field(default=None, min_length=1)
    """Address for them; by default the same as for calls."""
    metrics_tls: bool = False
    """Answer scrapes over TLS, with the same files as calls: of scrapers, too, certificates are asked."""
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """Port for administrative calls: load, unload, reload; none if left out."""
    admin_host: str = Field(default=LOOPBACK, min_length=1)
    """Address for them; any but this machine's own needs tokens, and TLS."""
    admin_tls: bool = False
    """Answer administrative calls over TLS, with the same files."""
    poll: float | None = Field(default=None, ge=0.1, allow_inf_nan=False)
    """Seconds between two looks at the model folder; by default only SIGHUP and Reload have it looked at."""
    watchdog: float = Field(default=60.0, ge=0.1, allow_inf_nan=False)
    """Seconds that one computation may take; then the server fails and ends."""
    tls_certificate: Path | None = None
    """PEM file of the certificate, then those between it and its CA; with it the port speaks TLS only."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key."""
    tls_client_ca: Path | None = None
    """PEM file of CA certificates; clients must show a certificate signed by one (mutual TLS)."""
    token_file: Path | None = None
    """File of tokens, made by limelight token; calls must bring one of them."""
    plaintext_tokens: bool = False
    """Take tokens without TLS from other machines: something in front ends it."""
    connections: int = Field(default=CONNECTIONS.connections, ge=1)
    """Most connections at a time; of the last quarter, those that nobody uses are closed."""
    connection_calls: int = Field(default=CONNECTIONS.connection_calls, ge=1)
    """Most calls at a time on one connection; more wait at the client."""
    connection_idle: float = Field(default=CONNECTIONS.connection_idle, ge=1, le=LONGEST, allow_inf_nan=False)
    """Seconds without a call after which a connection is closed."""
    connection_age: float | None = Field(default=None, ge=1, le=LONGEST, allow_inf_nan=False)
    """Seconds after which a connection takes no new calls and is closed; by default never."""
    keepalive: float = Field(default=CONNECTIONS.keepalive, ge=1, le=LONGEST, allow_inf_nan=False)
    """Seconds of silence after which a client is asked whether it is still there."""
    keepalive_timeout: float = Field(default=CONNECTIONS.keepalive_timeout, ge=0.1, le=LONGEST, allow_inf_nan=False)
    """Seconds that it has to answer; then its connection is closed."""
    handshake: float = Field(default=CONNECTIONS.handshake, ge=0.1, le=LONGEST, allow_inf_nan=False)
    """Seconds that a new connection has to begin with TLS and HTTP/2."""
    write_timeout: float = Field(default=60.0, ge=0.1, allow_inf_nan=False)
    """Seconds for which the client of a stream may read nothing; then its call ends."""
    log_format: Format = "text"
    """Of the log on standard error; json has one object a line."""
    log_level: Level = "info"
    """What is less important is not logged; info has a line for each call."""
    otlp_endpoint: str | None = Field(default=None, pattern="^https?://")
    """URL of an OpenTelemetry collector (OTLP over HTTP) that traces go to; none if left out."""
    port_file: Path | None = None
    """Write the port here once the server answers; for scripts using port 0."""

    @property
    def options(self) -> ServerOptions:
        """Where and how to serve."""
        return ServerOptions(
            host=self.host,
            port=self.port,
            grace=self.grace,
            limits=EngineLimits(**{field.name: getattr(self, field.name) for field in fields(EngineLimits)}),
            client_header=self.client_header,
            metrics_port=self.metrics_port,
            metrics_host=self.metrics_host,
            admin_port=self.admin_port,
            admin_host=self.admin_host,
            poll=self.poll,
            watchdog=self.watchdog,
            security=Security(**{field.name: getattr(self, field.name) for field in fields(Security)}),
            connection_limits=ConnectionLimits(
                **{one.name: getattr(self, one.name) for one in fields(ConnectionLimits)}
            ),
            write_timeout=self.write_timeout,
            log_format=self.log_format,
            log_level=self.log_level,
            otlp_endpoint=self.otlp_endpoint,
        )


def read_settings(file: Path | None, given: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Put them together.

    Args:
        file: TOML file, if there is one.
        given: by flags or variables, which typer has read already; None where neither is.
        environment: all variables: those of the prefix must be known.

    Raises:
        ConfigError: naming the file or variable, and what is wrong with it.
    """
    refuse_service_links(environment)
    known = Settings.model_fields.keys()
    for variable in environment:
        name = variable.removeprefix(PREFIX)
        if name != variable and name not in {one.upper() for one in (*known, "config")}:
            raise ConfigError(f"{variable}: there is no such setting{_meant(name.lower(), PREFIX, str.upper)}")
    values = {} if file is None else _read(file)
    for name in values.keys() - known:
        raise ConfigError(f"{file}: {name}: there is no such setting{_meant(name)}")
    for name, value in values.items():
        if isinstance(value, bool) and Settings.model_fields[name].annotation is not bool:
            raise ConfigError(
                f"{file}: {name}: true and false are no value for this"
            )  # pydantic takes them for 1 and 0
    try:
        return Settings(**values | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(f"{file or 'settings'}: {describe(error)}") from None


def refuse_service_links(environment: Mapping[str, str]) -> None:
    """Say so where variables of the prefix are not somebody's settings, but what Kubernetes tells of a Service.

    `LIMELIGHT_SERVE_PORT=tcp://10.0.0.1:50051` would otherwise be a port that is no number.

    Raises:
        ConfigError: with the Service, and the way out.
    """
    for variable, value in environment.items():
        link = SERVICE_LINK.fullmatch(variable)
        if link is not None and (link["port"] is None or "://" in value):
            service = link["service"].lower().replace("_", "-")
            raise ConfigError(
                f"{variable}={value}: is no setting, but what Kubernetes tells of a Service named {service}: "
                "set enableServiceLinks to false in the pod's spec, or name the Service otherwise"
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is no TOML: {error}") from None


def _meant(name: str, prefix: str = "", case: Callable[[str], str] = str) -> str:
    near = difflib.get_close_matches(name, Settings.model_fields, 1)
    return f"; {prefix}{case(near[0])} is meant?" if near else ""


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer find all settings among a command's parameters, in place of its `**given`."""
    signature = inspect.signature(command)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name, field))
        for name, field in Settings.model_fields.items()
    ]
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
    command.__annotations__ |= {flag.name: flag.annotation for flag in flags}
    return command


def _flag(name: str, field: FieldInfo) -> Any:
    kind: Any = field.annotation
    bounds = {type(bound): bound for bound in field.metadata}
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        *([SHORT[name]] if name in SHORT else []),
        envvar=f"{PREFIX}{name.upper()}",
        show_envvar=False,
        help=field.description,
        show_default=False if field.default is None else str(field.default),
        min=bounds[Ge].ge if Ge in bounds else None,
        max=bounds[Le].le if Le in bounds else None,
    )
    return Annotated[kind | None, option]
