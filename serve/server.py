"""Put a server together, start it, stop it: the services, health, reflection, the watch over the engines.

Stopping: health says NOT_SERVING, new calls are refused with UNAVAILABLE, calls in flight finish, and when nobody comes
any more the process ends.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import dataclasses
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve import admin, known
from serve.access import Access
from serve.addresses import bracketed
from serve.calls import Calls
from serve.connections import ConnectionLimits
from serve.engine import Engine
from serve.errors import AddressError
from serve.folder import ModelFolder
from serve.gate import Gate
from serve.health import Health
from serve.inference import INFERENCE, InferenceService
from serve.jobs import EngineLimits
from serve.logs import Format, Level
from serve.metrics import Metrics
from serve.models import Models
from serve.observer import Observer
from serve.pb.inference import grpc_service_pb2_grpc
from serve.pb.limelight.v1 import admin_pb2_grpc, limelight_pb2, limelight_pb2_grpc
from serve.room import Room
from serve.scrapes import Scraped
from serve.security import Security
from serve.service import LimelightService
from serve.tls import Tls, server_tls

if TYPE_CHECKING:
    from serve.tracing import Tracing

log = logging.getLogger(__name__)

SERVICE = limelight_pb2.DESCRIPTOR.services_by_name["LimelightService"].full_name

LOOPBACK = "127.0.0.1"
"""Where administrative calls are answered by default."""

ADMINISTRATORS = 16
"""Most connections for them."""

WATCH = 0.5
"""Most seconds between two looks at whether the engine comes back."""

FLUSH = 2.0
"""Seconds that finished answers have to leave when stopping."""

QUIET, LINGER = 1.5, 5.0
"""When stopping, seconds without a new call after which connections are closed, and for which calls may keep that up.
gRPC ends a call with CANCELLED that comes while it closes (grpc issue 41785), which no balancer takes for a refusal; so
balancers are to have noticed by then that health is NOT_SERVING: many look every second."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how to serve."""

    host: str = "127.0.0.1"
    """Address to listen on: by default this machine alone."""
    port: int = 50051
    """Port to listen on; 0 takes a free one."""

    @property
    def most_calls(self) -> int:
        """Calls of each model that may have begun and not ended, beyond which new ones are refused."""
        return self.limits.queue + 2 * self.limits.rows

    grace: float = 30.0
    """Seconds that calls in flight have to finish when stopping."""
    limits: EngineLimits = field(default_factory=EngineLimits)
    """What the engine takes on at a time."""
    client_header: str | None = None
    """Metadata key that tells clients apart, where a proxy sets it; without it, the address that a call came from."""
    metrics_port: int | None = None
    """Port for Prometheus' scrapes; 0 takes a free one, None none at all."""
    metrics_host: str | None = None
    """Address for them; None for the same."""
    admin_port: int | None = None
    """Port for the administrative calls; 0 takes a free one, None none at all."""
    admin_host: str = LOOPBACK
    """Address for them: by default this machine alone, and of any other, tokens are needed."""
    poll: float | None = None
    """Seconds between two looks at the model folder; None for none but those that are asked for."""
    write_timeout: float = 60.0
    """Seconds for which the client of a stream may take nothing; then its call ends."""
    watchdog: float = 60.0
    """Seconds for which the engine may compute without coming back; then the server gives it up and ends."""
    security: Security = field(default_factory=Security)
    """Who may ask, and over what."""
    connection_limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    """What one connection may do."""
    log_format: Format = "text"
    """Of the log's lines: for people, or one JSON object each."""
    log_level: Level = "info"
    """What is less important is not logged."""
    otlp_endpoint: str | None = None
    """URL of the OpenTelemetry collector that traces go to; None where calls are not traced."""


@dataclass(frozen=True)
class Parts:
    """What a server is put together of."""

    server: grpc.aio.Server
    administration: grpc.aio.Server | None
    health: Health
    calls: Calls
    models: Models
    folder: ModelFolder | None
    metrics: Metrics
    scraped: Scraped | None
    observer: Observer


class Server:
    """A running server.

    Attributes:
        models: that it answers with.
        port: that it listens on.
        admin_port: that administrative calls are answered on; None where they are not.
        metrics_port: that scrapes are answered on; None where they are not.
        failed: set when an engine has died or was given up; health says NOT_SERVING from then on.
    """

    def __init__(self, parts: Parts, options: ServerOptions, port: int, admin_port: int | None) -> None:
        self._parts, self._server, self._calls = parts, parts.server, parts.calls
        self.models, self.port, self.admin_port = parts.models, port, admin_port
        self.metrics_port = None if parts.scraped is None else parts.scraped.port
        self.failed = asyncio.Event()
        self._reloading: set[asyncio.Task[None]] = set()
        self._serving = True
        parts.metrics.gauge("serving", "1 while health says SERVING, else 0.", lambda: self._serving)
        room = Room(port, options.connection_limits.connections, lambda: parts.calls.peers, parts.metrics)
        work = [self._watch(options.watchdog), parts.metrics.watch_loop(), room.watch()]
        if parts.folder is not None and options.poll is not None:
            work.append(parts.folder.watch(options.poll))
        self._watching = [asyncio.create_task(one) for one in work]

    async def _serve_no_more(self) -> None:
        self._serving = False
        await self._parts.health.enter_graceful_shutdown()

    async def _watch(self, seconds: float) -> None:
        look = min(seconds / 4, WATCH)
        while not (lost := [one.engine for one in self.models.all if _lost(one.engine, seconds)]):
            if not await _runs_on(self._server, look):
                log.critical("gRPC's server has ended by itself")
                break
        else:
            log.critical("an engine %s", "hangs: it is given up" if lost[0].alive else "has failed")
        try:
            await self._serve_no_more()
            for serving in self.models.all:
                serving.engine.give_up()
        finally:
            self.failed.set()

    def reload(self) -> None:
        """Begin to look at the model folder again, if there is one."""
        if self._parts.folder is not None:
            task = asyncio.create_task(self._parts.folder.look_again())
            self._reloading.add(task)
            task.add_done_callback(self._reloading.discard)

    async def stop(self, grace: float) -> bool:
        """Stop taking calls and finish those in flight.

        Args:
            grace: seconds that they have.

        Returns:
            Whether all of them finished, and the engine had not failed.
        """
        await self._serve_no_more()
        self._calls.drain()
        finished = await self._calls.wait_until_idle(grace)
        await self._calls.wait_until_quiet(QUIET, min(grace, LINGER) if finished else 0)
        for task in self._watching:
            task.cancel()
        # Large answers may still be on their way out; a health watch, which never ends, is not waited for any longer.
        await self._server.stop(min(grace, FLUSH) if finished else 0)
        if self._parts.administration is not None:
            await self._parts.administration.stop(0)
        stopped = await self.models.stop(1.0)
        if self._parts.scraped is not None:
            await asyncio.to_thread(self._parts.scraped.stop)
        await asyncio.to_thread(self._parts.observer.stop, FLUSH)
        return finished and stopped

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self._server.wait_for_termination()


async def _runs_on(server: grpc.aio.Server, seconds: float) -> bool:
    """Whether gRPC's server still runs in so many seconds, which it does unless something in it has failed."""
    try:
        return await server.wait_for_termination(seconds)
    except Exception:
        log.exception("gRPC's server has failed")
        return False


def _lost(engine: Engine, seconds: float) -> bool:
    """It is dead, or does not come back."""
    return engine.silent >= seconds or not (engine.alive or engine.stopping)


async def create_server(models: Models, options: ServerOptions, folder: ModelFolder | None = None) -> Server:
    """Start serving models.

    Args:
        models: what answers.
        options: where and how.
        folder: keeps them up to date, if anything does.

    Raises:
        AddressError: an address cannot be listened on.
        ConfigError: what should protect it cannot be used.
    """
    options.security.check(options.host, options.admin_host)
    options.connection_limits.provide_files()
    tls, access = server_tls(options.security), Access(options.security.token_file)
    metrics = Metrics(models)
    observer = Observer(metrics, options.client_header, _tracing(options.otlp_endpoint))
    gate = Gate(models, access, options.client_header)
    calls = Calls(lambda: options.most_calls * max(1, len(models.all)), observer, options.write_timeout, access, gate)
    server = known.create([calls], options.connection_limits.arguments())
    _observe(metrics, models, calls, options.limits)
    what = "Entries of the model folder whose newest contents cannot be served."
    metrics.gauge("failed_entries", what, lambda: 0 if folder is None else folder.failed)
    if tls is not None:
        metrics.gauge("certificate_seconds_left", "Until the server's certificate expires.", lambda: tls.seconds_left)
    service = LimelightService(models, calls.stopping, metrics, options.client_header)
    limelight_pb2_grpc.add_LimelightServiceServicer_to_server(service, server)
    inference = InferenceService(models, calls.stopping, metrics, options.client_header)
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)
    servicer = Health()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE, INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = _listen(server, options.host, options.port, tls)
    administration, admin_port = _administration(folder, inference, calls, options, tls)
    scraped = _scraped(metrics, options, tls)
    await server.start()
    if administration is not None:
        await administration.start()
        log.info("administrative calls on %s:%d", bracketed(options.admin_host), admin_port)
    if scraped is not None:
        host = bracketed(options.metrics_host or options.host)
        log.info("metrics on %s://%s:%d/metrics", scraped.scheme, host, scraped.port)
    for name in ("", SERVICE, INFERENCE):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    parts = Parts(server, administration, servicer, calls, models, folder, metrics, scraped, observer)
    return Server(parts, options, port, admin_port)


def _tracing(endpoint: str | None) -> Tracing | None:
    if endpoint is None:
        return None
    from serve.tracing import Tracing, exporter_to  # noqa: PLC0415  # only who traces needs its packages

    return Tracing(exporter_to(endpoint))


def _administration(
    folder: ModelFolder | None, inference: InferenceService, calls: Calls, options: ServerOptions, tls: Tls | None
) -> tuple[grpc.aio.Server | None, int | None]:
    """Administrative calls and the port that they are on, where they are wanted."""
    if folder is None or options.admin_port is None:
        return None, None
    limits = dataclasses.replace(options.connection_limits, connections=ADMINISTRATORS)
    server = known.create([calls.administrative], limits.arguments())
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin.AdminService(folder), server)
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference.administered(folder), server)
    reflection.enable_server_reflection((admin.SERVICE, INFERENCE, reflection.SERVICE_NAME), server)
    own = tls if options.security.admin_tls else None
    return server, _listen(server, options.admin_host, options.admin_port, own)


def _scraped(metrics: Metrics, options: ServerOptions, tls: Tls | None) -> Scraped | None:
    """What answers scrapes, where they are wanted."""
    if options.metrics_port is None:
        return None
    context = tls.context if tls is not None and options.security.metrics_tls else None
    return Scraped(metrics.registry, options.metrics_host or options.host, options.metrics_port, context)


def _listen(server: grpc.aio.Server, host: str, port: int, tls: Tls | None) -> int:
    address = f"{bracketed(host)}:{port}"
    try:
        return server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.credentials())
    except RuntimeError:
        raise AddressError(f"cannot listen on {address}: is another server there? Port 0 takes a free one") from None


def _observe(metrics: Metrics, models: Models, calls: Calls, limits: EngineLimits) -> None:
    def total(read: Callable[[Engine], float]) -> Callable[[], float]:
        return lambda: sum(read(serving.engine) for serving in models.all)

    metrics.gauge("queue_length", "Requests waiting for an engine.", total(lambda engine: engine.waiting))
    metrics.gauge("queue_limit", "Most of them for each model; one more is refused.", lambda: limits.queue)
    metrics.gauge("queue_tokens", "Tokens that these can come to keep.", total(lambda engine: engine.waiting_tokens))
    metrics.gauge("queue_tokens_limit", "Most of them for each model.", lambda: limits.queue_tokens)
    metrics.gauge("queue_bytes", "Bytes of the requests that wait.", total(lambda engine: engine.waiting_bytes))
    metrics.gauge("queue_bytes_limit", "Most of them for each model.", lambda: limits.queue_bytes)
    metrics.gauge("rows", "Rows (sentences times beams) under way.", total(lambda engine: engine.rows))
    metrics.gauge("rows_limit", "Most of them for each model.", lambda: limits.rows)
    metrics.gauge("calls_in_flight", "Calls being answered.", lambda: calls.in_flight)
    metrics.gauge(
        "engine_silent_seconds",
        "Since the engine that is silent longest last came back from a pass.",
        lambda: max((serving.engine.silent for serving in models.all), default=0.0),
    )


async def serve_until_signal(
    models: Models, options: ServerOptions, ready: Callable[[Server], None], folder: ModelFolder | None = None
) -> bool:
    """Serve until SIGTERM or SIGINT, then stop gracefully; a second signal, or an engine that failed, stops at once.

    SIGHUP has the model folder looked at again.

    Args:
        models: what answers.
        options: where and how.
        ready: told when the server answers.
        folder: keeps the models up to date, if anything does.

    Returns:
        Whether everything in flight was finished, and the engine had not failed.
    """
    server = await create_server(models, options, folder)
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    try:
        ready(server)
    except BaseException:
        await server.stop(0)
        raise
    failed = asyncio.ensure_future(server.failed.wait())
    first = asyncio.ensure_future(signals.get())
    await asyncio.wait((first, failed), return_when=asyncio.FIRST_COMPLETED)
    if not first.done():
        await server.stop(FLUSH)  # whoever waited is told
        return False
    failed.cancel()
    log.info("stopping: signal %s", signal.Signals(first.result()).name)
    stopping = asyncio.ensure_future(server.stop(options.grace))
    impatient = asyncio.ensure_future(signals.get())
    await asyncio.wait((stopping, impatient), return_when=asyncio.FIRST_COMPLETED)
    impatient.cancel()
    return stopping.result() if stopping.done() else False
