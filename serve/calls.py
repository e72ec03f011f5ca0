"""What every call goes through: it is counted in and out, admitted, and its error becomes a status."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from serve.access import Access, caller_name, forget_caller
from serve.errors import STOPPING, ShuttingDownError, SlowReaderError
from serve.gate import Gate
from serve.observer import Observer
from serve.shares import UNREAD, Shares
from serve.status import refuse
from serve.wire import Writer, exempt_stream, exempt_unary, rewired

EXEMPT = ("/grpc.health.v1.Health/", "/grpc.reflection.", "/inference.GRPCInferenceService/Server")
"""Calls that are answered even while shutting down."""

Begun = Callable[[str, Any], Awaitable[Exception | None]]
"""Told of each call's method and context: see `serve.wire.Begun`."""


class Calls(grpc.aio.ServerInterceptor):
    """Counts calls in flight, refuses new ones while draining, and turns errors into status codes.

    Args:
        most: calls that may have begun and not ended, beyond which new ones are refused before anything is done for
            them; asked each time.
        observer: told of each call's beginning and end.
        write_timeout: see `ServerOptions`.
        access: says who may call what; by default everybody may call everything.
        gate: says who is turned away before anything is read; by default nobody is.

    Attributes:
        stopping: set when no new calls are taken.
        in_flight: calls being answered; health and reflection do not count.
        peers: gRPC's names of the connections that they came over, and how many over each.
    """

    def __init__(
        self,
        most: Callable[[], int],
        observer: Observer,
        write_timeout: float,
        access: Access | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._observer, self._access, self._gate = observer, access or Access(), gate
        self._shares, self._exempt = Shares(most, UNREAD), Shares(most, UNREAD)
        self._writer = Writer(write_timeout)
        self._handlers: dict[tuple[str, Begun], tuple[object, grpc.RpcMethodHandler[Any, Any]]] = {}
        self.stopping = asyncio.Event()
        self.in_flight = 0
        self._last = -math.inf
        self.peers = Counter[str]()
        self._idle = asyncio.Event()
        self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call."""
        return await self._wrapped(continuation, handler_call_details, self._begun)

    @property
    def administrative(self) -> grpc.aio.ServerInterceptor:
        """The same for administrative calls, which are never too many: who is to mend things must get in."""
        return _Administrative(partial(self._wrapped, begun=_unlimited))

    async def _wrapped(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
        begun: Begun,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler, method = await continuation(details), details.method
        if handler is None:
            return None
        before, after = self._handlers.get((method, begun), (None, handler))
        if before is not handler:
            if method.startswith(EXEMPT):
                after = rewired(handler, exempt_unary, exempt_stream, self._begun_exempt)
            else:
                unary, stream = partial(self._wrap_unary, method), partial(self._wrap_stream, method)
                after = rewired(handler, unary, stream, partial(begun, method))
            self._handlers[method, begun] = handler, after
        return after

    async def _begun(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Exception | None:
        if (error := self._shares.begun(context)) is not None:
            return error
        if self._gate is not None and not self.draining and (refusal := self._gate.refusal(method, context)):
            refused = self._observer.turned_away(method, context, refusal)
            await context.abort(refused.code, refused.message, refused.metadata)
        return None

    async def _begun_exempt(self, context: grpc.aio.ServicerContext[Any, Any]) -> Exception | None:
        return self._exempt.begun(context, bounded=False)

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

    async def wait_until_quiet(self, seconds: float, most: float) -> None:
        """Wait until no call has come for so many seconds, but no longer than for the most."""
        end = time.monotonic() + most
        while (left := min(self._last + seconds, end) - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)

    def _wrap_unary(self, method: str, answer: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._call(method, request, context):
                response = await answer(request, context)
                self._shares.answered(context, response.ByteSize() if isinstance(response, Message) else len(response))
                return response

        return call

    def _wrap_stream(self, method: str, answer: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async with self._call(method, request, context), aclosing(answer(request, context)) as responses:
                await self._writer.write(context, responses)

        return call

    @asynccontextmanager
    async def _call(
        self, method: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[None]:
        """What every call goes through: counted in and out, admitted, its error told."""
        forget_caller()
        call, code, reason = self._observer.begun(method, context), grpc.StatusCode.CANCELLED, "CANCELLED"
        self._enter(context)
        try:
            self._access.let_in(method, context.invocation_metadata() or ())
            call.client = caller_name() or call.client
            self._admit()
            if isinstance(request, Exception):  # what it holds was no message
                raise request
            yield
            code, reason = grpc.StatusCode.OK, "OK"
        except grpc.aio.InternalError:  # of gRPC, which could not write: nobody is left to be told
            raise
        except Exception as error:
            refused = refuse(error, request)
            code, reason = refused.code, refused.reason
            if isinstance(error, SlowReaderError):
                await self._writer.end(context, refused)
            else:
                await context.abort(refused.code, refused.message, refused.metadata)
        finally:
            call.ended(code, reason)

    def _admit(self) -> None:
        if self.draining:
            raise ShuttingDownError(STOPPING)

    def _enter(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        peer = context.peer()
        self.in_flight += 1
        self._last = time.monotonic()
        self.peers[peer] += 1
        self._idle.clear()
        leave: Any = lambda _: self._leave(peer)  # noqa: E731  # grpc's types ask for a class of theirs
        # Not when the handler returns: gRPC still has to send what it returned.
        context.add_done_callback(leave)

    def _leave(self, peer: str) -> None:
        self.in_flight -= 1
        self.peers[peer] -= 1
        if not self.peers[peer]:
            del self.peers[peer]
        if self.in_flight == 0:
            self._idle.set()


async def _unlimited(_: str, __: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Of calls that are never too many."""


class _Administrative(grpc.aio.ServerInterceptor):
    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return await self._wrapped(continuation, handler_call_details)
