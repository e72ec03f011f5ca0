"""The standard health service, `grpc.health.v1.Health`, where its package leaves something to be wished for."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from serve.errors import NotOfferedError

Context = grpc.aio.ServicerContext[Any, Any]


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # the package has no types
    """Tells how the services are."""

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:
        """See the package's health.proto: it does not answer this call, and says so with an exception."""
        raise NotOfferedError("health is told of one service at a time: use Check or Watch")

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """See health.proto.

        The package writes under a lock that every change takes, too: a client that does not read would keep the server
        from saying that it stops, and so from stopping.
        """
        told = _Told()
        watching = asyncio.create_task(super().Watch(request, told))
        try:
            while True:
                await context.write(await told.queue.get())
        finally:
            watching.cancel()


class _Told:
    """What is written to it, waits to be read."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[health_pb2.HealthCheckResponse] = asyncio.Queue()

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        self.queue.put_nowait(response)
