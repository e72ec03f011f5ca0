"""Put a server together, start it, stop it: the service, health, reflection, and one place where errors become status.

Stopping: health says NOT_SERVING, new calls are refused with UNAVAILABLE, calls in flight finish, the process ends.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.bundle import ServedModel
from serve.engine import Engine
from serve.errors import STOPPING, AddressError, QueueFullError, ShuttingDownError
from serve.jobs import EngineLimits
from serve.metrics import Metrics, Scraped
from serve.pb.limelight.v1 import limelight_pb2, limelight_pb2_grpc
from serve.service import LimelightService
from serve.status import refuse

log = logging.getLogger(__name__)

SERVICE = limelight_pb2.DESCRIPTOR.services_by_name["LimelightService"].full_name

EXEMPT = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Calls that are answered even while shutting down."""

OPTIONS = (
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", 256 * 1024 * 1024),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # by default, clients that ping often are cut off
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake to be told of
)

RETRY_AFTER = 1.0
"""Seconds after which a caller is to try again who came while too many calls were in flight."""

WATCH = 0.5
"""Most seconds between two looks at whether the engine comes back."""

FLUSH = 2.0
"""Seconds that finished answers have to leave when stopping."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how to serve."""

    host: str = "127.0.0.1"
    """Address to listen on: by default this machine alone."""
    port: int = 50051
    """Port to listen on; 0 takes a free one."""

    @property
    def authority(self) -> str:
        """The host as it stands before a colon and a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    grace: float = 30.0
    """Seconds that calls in flight have to finish when stopping."""
    limits: EngineLimits = field(default_factory=EngineLimits)
    """What the engine takes on at a time."""
    client_header: str | None = None
    """Metadata key that tells clients apart, where a proxy sets it; without it, the address that a call came from."""
    metrics_port: int | None = None
    """Port for Prometheus' scrapes, on the same host; 0 takes a free one, None none at all."""
    watchdog: float = 60.0
    """Seconds for which the engine may compute without coming back; then the server gives it up and ends."""


class Server:
    """A running server.

    Attributes:
        port: that it listens on.
        metrics_port: that scrapes are answered on; None where they are not.
        failed: set when the engine has died or was given up; health says NOT_SERVING from then on.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        engine: Engine,
        servicer: health.aio.HealthServicer,
        calls: Calls,
        port: int,
        watchdog: float,
        metrics: Metrics,
        scraped: Scraped | None,
    ) -> None:
        self._server, self._engine, self._health, self._calls = server, engine, servicer, calls
        self.port = port
        self._scraped = scraped
        self.metrics_port = None if scraped is None else scraped.port
        self.failed = asyncio.Event()
        self._watching = [asyncio.create_task(work) for work in (self._watch(watchdog), metrics.watch_loop())]

    async def _watch(self, seconds: float) -> None:
        while self._engine.alive and self._engine.silent < seconds:  # noqa: ASYNC110  # of another thread
            await asyncio.sleep(min(seconds / 4, WATCH))
        log.critical("the engine %s", "hangs: it is given up" if self._engine.alive else "has failed")
        try:
            await self._health.enter_graceful_shutdown()
            self._engine.give_up()
        finally:
            self.failed.set()

    async def stop(self, grace: float) -> bool:
        """Stop taking calls and finish those in flight.

        Args:
            grace: seconds that they have.

        Returns:
            Whether all of them finished, and the engine had not failed.
        """
        await self._health.enter_graceful_shutdown()
        self._calls.drain()
        finished = await self._calls.wait_until_idle(grace)
        for task in self._watching:
            task.cancel()
        # Large answers may still be on their way out; a health watch, which never ends, is not waited for any longer.
        await self._server.stop(min(grace, FLUSH) if finished else 0)
        stopped = await asyncio.get_running_loop().run_in_executor(None, self._engine.stop, 1.0)
        if self._scraped is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._scraped.stop)
        return finished and stopped and not self._engine.failed

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self._server.wait_for_termination()


class Calls(grpc.aio.ServerInterceptor):
    """Counts calls in flight, refuses new ones while draining, and turns errors into status codes.

    Args:
        most: calls in flight, beyond which new ones are refused before anything is done for them.
        metrics: told of each call's end.

    Attributes:
        stopping: set when no new calls are taken.
        in_flight: calls being answered; health and reflection do not count.
    """

    def __init__(self, most: int, metrics: Metrics) -> None:
        self._most, self._metrics = most, metrics
        self.stopping = asyncio.Event()
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(EXEMPT):
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        coding = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._wrap_unary(method, handler.unary_unary), *coding)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._wrap_stream(method, handler.unary_stream), *coding)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._wrap_stream(method, handler.stream_stream), *coding)
        return handler

    @property
    def draining(self) -> bool:
        """No new calls are taken."""
        return self.stopping.is_set()

    def drain(self) -> None:
        """Take no new calls from now on."""
        self.stopping.set()

    async def wait_until_idle(self, seconds: float) -> bool:
        """Wait for the calls in flight; returns whether they finished in time."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return self._idle.is_set()  # 0 seconds are over before anything is looked at
        return True

    def _wrap_unary(self, method: str, answer: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._call(method, request, context):
                return await answer(request, context)

        return call

    def _wrap_stream(self, method: str, answer: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            async with self._call(method, request, context):
                async for response in answer(request, context):
                    yield response

        return call

    @asynccontextmanager
    async def _call(
        self, method: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[None]:
        """What every call goes through: counted in and out, admitted, its error told."""
        arrived, code, reason = time.monotonic(), "CANCELLED", "CANCELLED"
        self._enter(context)
        try:
            self._admit()
            yield
            code = reason = "OK"
        except Exception as error:
            refused = refuse(error, request)
            code, reason = refused.code.name, refused.reason
            await context.abort(refused.code, refused.message, refused.metadata)
        finally:
            self._metrics.ended(method, code, reason, time.monotonic() - arrived)

    def _admit(self) -> None:
        if self.draining:
            raise ShuttingDownError(STOPPING)
        if self.in_flight > self._most:
            raise QueueFullError(
                f"{self._most} requests are being answered or wait, which is the limit: retry later", RETRY_AFTER
            )

    def _enter(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.in_flight += 1
        self._idle.clear()
        leave: Any = lambda _: self._leave()  # noqa: E731  # grpc's types ask for a class of theirs
        # Not when the handler returns: gRPC still has to send what it returned.
        context.add_done_callback(leave)

    def _leave(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()


async def create_server(model: ServedModel, options: ServerOptions) -> Server:
    """Start serving a model.

    Raises:
        AddressError: the address cannot be listened on.
    """
    metrics = Metrics(model.manifest, model.precision, model.provider)
    calls = Calls(options.limits.queue + 2 * options.limits.rows, metrics)
    server = grpc.aio.server(interceptors=[calls], options=OPTIONS)
    engine = Engine(model.steps, options.limits, model.shortlist)
    _observe(metrics, engine, calls, options.limits)
    service = LimelightService(model, engine, calls.stopping, metrics, options.client_header)
    limelight_pb2_grpc.add_LimelightServiceServicer_to_server(service, server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = _listen(server, options)
        scraped = None if options.metrics_port is None else metrics.serve(options.host, options.metrics_port)
    except AddressError:
        engine.stop()
        raise
    await server.start()
    if scraped is not None:
        log.info("metrics on http://%s:%d/metrics", options.authority, scraped.port)
    for name in ("", SERVICE):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return Server(server, engine, servicer, calls, port, options.watchdog, metrics, scraped)


def _listen(server: grpc.aio.Server, options: ServerOptions) -> int:
    try:
        return server.add_insecure_port(f"{options.authority}:{options.port}")
    except RuntimeError:
        raise AddressError(
            f"cannot listen on {options.authority}:{options.port}: is another server there? Port 0 takes a free one"
        ) from None


def _observe(metrics: Metrics, engine: Engine, calls: Calls, limits: EngineLimits) -> None:
    metrics.gauge("queue_length", "Requests waiting in the engine's queue.", lambda: engine.waiting)
    metrics.gauge("queue_limit", "Most of them; one more is refused.", lambda: limits.queue)
    metrics.gauge("queue_tokens", "Tokens that these can come to keep.", lambda: engine.waiting_tokens)
    metrics.gauge("queue_tokens_limit", "Most of them.", lambda: limits.queue_tokens)
    metrics.gauge("queue_bytes", "Bytes of the requests that wait.", lambda: engine.waiting_bytes)
    metrics.gauge("queue_bytes_limit", "Most of them.", lambda: limits.queue_bytes)
    metrics.gauge("rows", "Rows (sentences times beams) under way.", lambda: engine.rows)
    metrics.gauge("rows_limit", "Most of them.", lambda: limits.rows)
    metrics.gauge("calls_in_flight", "Calls being answered.", lambda: calls.in_flight)
    metrics.gauge("engine_silent_seconds", "Since the engine last came back from a pass.", lambda: engine.silent)
    metrics.count(lambda: engine.counts)


async def serve_until_signal(model: ServedModel, options: ServerOptions, ready: Callable[[int], None]) -> bool:
    """Serve until SIGTERM or SIGINT, then stop gracefully; a second signal, or an engine that failed, stops at once.

    Args:
        model: what to serve.
        options: where and how.
        ready: told the port when the server answers.

    Returns:
        Whether everything in flight was finished, and the engine had not failed.
    """
    server = await create_server(model, options)
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        ready(server.port)
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
