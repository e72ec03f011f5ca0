"""gRPC's server, but one that a call of an unknown method cannot end.

gRPC (1.85) takes calls of methods that it knows, each by its name, and all others together. Of these it reads the name
as UTF-8, in the loop that takes every call, and where that fails the loop ends: one frame from anybody who can connect,
and the server is gone, with all that it was answering. Nobody has a use for the name of a method that is not there, so
here such calls are answered without it. What is used for that is not part of gRPC's promises: where it is not there any
more, the server is gRPC's own, and `tests/serve/test_faults_transport.py` says whether that will do.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # its types leave it out

NEEDED = ("AioServer", "_MethodResolver", "_handle_rpc", "_schedule_rpc_coro")
"""Of gRPC's inner parts: the server, what knows its methods, what answers a call, and what sees to its end."""

Base: Any
resolver: Any
handle: Any
schedule: Any
Base, resolver, handle, schedule = (getattr(cygrpc, name, object) for name in NEEDED)

GUARDED = all(hasattr(cygrpc, name) for name in NEEDED) and hasattr(Base, "_request_call")
"""They are there."""


def create(interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """A server.

    Args:
        interceptors: that every call goes through.
        options: channel arguments.
    """
    if GUARDED:
        cygrpc.AioServer = Guarded  # which is what it is made of: it takes no other as an argument
    try:
        return grpc.aio.server(interceptors=interceptors, options=options)
    finally:
        if GUARDED:
            cygrpc.AioServer = Base


class Guarded(Base):  # type: ignore[misc]  # which mypy knows nothing of
    """Answers calls of unknown methods by itself."""

    async def _request_call(self) -> Any:
        """Wait for calls of unknown methods, and end each with UNIMPLEMENTED; gives none of them to gRPC's loop."""
        loop, answering = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        nothing = resolver([], {})
        while True:
            call = await super()._request_call()
            answer = handle("", nothing, (), call, loop, False)
            task = loop.create_task(schedule(answer, call, loop, ""))
            answering.add(task)
            task.add_done_callback(answering.discard)
