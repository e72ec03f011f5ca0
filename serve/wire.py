"""Messages on their way in and out: what is none is refused, and who reads none is given up."""

from __future__ import annotations  # grpc's and asyncio's classes are generic to mypy alone

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from model.errors import InvalidRequestError
from serve.errors import SlowReaderError
from serve.status import Refusal

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
