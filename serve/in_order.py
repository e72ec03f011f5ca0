"""Requests of a stream, answered at the same time and sent in the order in which they came."""

from __future__ import annotations  # asyncio's classes are generic to mypy alone

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from serve.errors import STOPPING, ShuttingDownError

Request = TypeVar("Request")
Response = TypeVar("Response")

TOGETHER = 64
"""Requests of one stream that are answered, or whose answers wait to be sent: more are not read until one is gone."""


async def answer_in_order(
    requests: AsyncIterator[Request],
    answer: Callable[[Request], Coroutine[Any, Any, Response]],
    stopping: asyncio.Event,
) -> AsyncIterator[Response]:
    """Answers; ends when all that came are answered and no more will come.

    Args:
        requests: as they are read. What goes wrong with reading them is raised.
        answer: answers one. What it raises ends the stream.
        stopping: the server takes nothing new.

    Raises:
        ShuttingDownError: the server takes nothing new, and all that came is answered.
    """
    places = asyncio.Semaphore(TOGETHER)
    under_way: asyncio.Queue[asyncio.Task[Response] | None] = asyncio.Queue()
    tasks: set[asyncio.Task[Response]] = set()

    async def read() -> None:
        try:
            async for request in requests:
                await places.acquire()
                task = asyncio.create_task(answer(request))
                tasks.add(task)
                under_way.put_nowait(task)
        finally:
            under_way.put_nowait(None)

    reader, stopped = asyncio.create_task(read()), asyncio.create_task(stopping.wait())
    try:
        while (task := await _next(under_way, stopped)) is not None:
            yield await task
            tasks.discard(task)
            places.release()
        await reader  # what went wrong with reading
    finally:
        left = [reader, stopped, *tasks]
        for one in left:
            one.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def _next(
    under_way: asyncio.Queue[asyncio.Task[Response] | None], stopped: asyncio.Task[Any]
) -> asyncio.Task[Response] | None:
    """What is to be sent next; None at the end."""
    getter = asyncio.create_task(under_way.get())
    try:
        await asyncio.wait((getter, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not getter.done():
            raise ShuttingDownError(STOPPING)
        return getter.result()
    finally:
        getter.cancel()
