"""Messages on their way in and out: what is none is refused, and who reads none is given up."""

from __future__ import annotations  # grpc's and asyncio's classes are generic to mypy alone

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from model.errors import InvalidRequestError
from serve.errors import SlowReaderError
from serve.status import Refusal, refuse

Read = Callable[[bytes], Any]


def checked(read: Read | None, *, streamed: bool) -> Read | None:
    """Read a call's requests, so that bytes which are no message are a fault of the client, and told as one.

    Args:
        read: what reads them; None where they are taken as they are.
        streamed: there are many, and what is raised ends the stream. Of a single one gRPC would tell the exception's
            text as it is: an `InvalidRequestError` comes in its place, to be raised where the call is answered.
    """
    if read is None:
        return None

    def checked(message: bytes) -> Any:
        try:
            return read(message)
        except DecodeError:
            error = InvalidRequestError("request", f"{len(message)} bytes are no message of this call, or not in UTF-8")
        if streamed:
            raise error
        return error

    return checked


Answer = Callable[[Any, Any], Any]
"""Answers a call: takes its request or requests, or an exception in their place, and its context."""

Begun = Callable[[Any], Awaitable[Exception | None]]
"""Told of a call's context. It may end the call."""

MESSAGE = 60.0
"""Seconds that the one message of a call may take to come."""


def rewired(
    handler: grpc.RpcMethodHandler[Any, Any],
    unary: Callable[[Answer], Answer],
    stream: Callable[[Answer], Answer],
    begun: Begun,
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same calls, whose answers go through others.

    To gRPC every call takes many messages. Of those that take one, it would leave a call for ever that ends without it,
    and tell nobody; so that one is read here.

    Args:
        handler: of a call.
        unary: makes what answers calls with one answer of what did so before.
        stream: the same for calls with many.
        begun: told of each call before it is read. What it gives is what is answered, in place of a request.
    """
    single = not handler.request_streaming
    coding = checked(handler.request_deserializer, streamed=not single), handler.response_serializer
    before: Any = handler  # of which gRPC's types do not say which answer it has
    if handler.response_streaming:
        many = stream(before.unary_stream or before.stream_stream)
        return grpc.stream_stream_rpc_method_handler(
            _forgetting((_of_one if single else _of_many)(many, begun)), *coding
        )
    one = unary(before.unary_unary or before.stream_unary)
    return grpc.stream_unary_rpc_method_handler(_forgetting((_of_one if single else _of_many)(one, begun)), *coding)


def _forgetting(answer: Answer) -> Answer:
    """Answers a call, and leaves nothing of its error behind.

    gRPC keeps what it raised to end a call until Python sweeps its memory. That would keep the error it came of, and
    the frames of both with all that they knew: a model that has been swapped out, say.
    """

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await answer(request, context)
        except grpc.aio.AbortError as aborted:
            aborted.__context__ = None
            raise aborted.with_traceback(None) from None

    return call


def _of_one(answer: Answer, begun: Begun) -> Answer:
    """Answers a call whose requests are a stream, of which the first is all."""

    async def call(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await answer(await begun(context) or await _read(context), context)

    return call


async def _read(context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    try:
        async with asyncio.timeout(MESSAGE):
            message: Any = await context.read()
    except TimeoutError:
        return InvalidRequestError("request", f"no message has come within {MESSAGE:g} s")
    if message is grpc.aio.EOF:
        return InvalidRequestError("request", "the call has ended without a message")
    return message


def _of_many(answer: Answer, begun: Begun) -> Answer:
    async def call(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await answer(await begun(context) or requests, context)

    return call


def exempt_unary(answer: Answer) -> Answer:
    """Answers a call that neither counts nor is counted: only its errors are told as those of all others are."""

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with _told(request, context):
            return await answer(request, context)

    return call


def exempt_stream(answer: Answer) -> Answer:
    """The same for one with many answers."""

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with _told(request, context):
            answers = answer(request, context)
            if inspect.isawaitable(answers):  # it writes them itself
                await answers
                return
            async with aclosing(answers) as responses:
                async for response in responses:
                    await context.write(response)

    return call


@asynccontextmanager
async def _told(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    try:
        if isinstance(request, Exception):  # what it holds was no message
            raise request
        yield
    except grpc.aio.BaseError:  # it has been told, or nobody is left to be
        raise
    except Exception as error:
        refused = refuse(error, request)
        await context.abort(refused.code, refused.message, refused.metadata)


class Writer:
    """Writes the messages of all streams.

    Args:
        seconds: for which a client may take nothing.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ending: set[asyncio.Task[Any]] = set()

    async def write(self, context: grpc.aio.ServicerContext[Any, Any], responses: AsyncIterator[Any]) -> None:
        """Write messages, each when the client, or HTTP/2's window, has room for all of it.

        Raises:
            SlowReaderError: there was none for too long.
        """
        begun = False
        async for response in responses:
            if (
                not begun
            ):  # by itself: with a first message that hangs, gRPC would send it again with the status, and fail
                await context.send_initial_metadata(())
                begun = True
            await self._write(context, response)

    async def _write(self, context: grpc.aio.ServicerContext[Any, Any], response: Any) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await context.write(response)
        except TimeoutError:
            raise SlowReaderError(
                f"nothing of this stream was read for {self._seconds:g} s: read faster, or ask for less"
            ) from None

    async def end(self, context: grpc.aio.ServicerContext[Any, Any], refused: Refusal) -> None:
        """End the stream of a reader who takes nothing, without waiting for that one to hear of it.

        The status goes out behind what was written before, so it may be long on its way; all that is kept for the call
        by then is what gRPC holds of its last message.
        """
        ending = asyncio.ensure_future(context.abort(refused.code, refused.message, refused.metadata))
        self._ending.add(ending)
        ending.add_done_callback(self._ended)
        await asyncio.sleep(0)  # it begins, after which gRPC takes the handler's return for the end of the call

    def _ended(self, ending: asyncio.Task[Any]) -> None:
        self._ending.discard(ending)
        if not ending.cancelled():
            ending.exception()  # that it was aborted, or that the client has gone: both are how it is to end
