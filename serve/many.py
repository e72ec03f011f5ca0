"""Many texts over one stream: each is answered by itself, and sent when it is ready."""

from __future__ import annotations  # asyncio's classes are generic to mypy alone

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from model.errors import InvalidRequestError
from serve.convert import refuse_unknown_fields
from serve.errors import STOPPING, ShuttingDownError
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.status import refuse

LONGEST_ID = 256
"""Characters of an item's id."""

TOGETHER = 64
"""Items of one stream that are answered, or whose answers wait to be sent: more are not read until one is gone."""

Answer = Callable[[pb.GenerateRequest], Awaitable[pb.GenerateResponse]]


async def answer_many(
    requests: AsyncIterator[pb.GenerateManyRequest],
    answer: Answer,
    stopping: asyncio.Event,
    told: Callable[[str, str], None] = lambda code, reason: None,
) -> AsyncIterator[pb.GenerateManyResponse]:
    """Answers in the order in which they are ready; ends when all that came are answered and no more will come.

    Args:
        requests: as they are read. What goes wrong with reading them is raised.
        answer: answers one. What it raises becomes that item's error.
        stopping: the server takes nothing new; items that come now are refused, those that came are answered.
        told: code and reason of each item's end.

    Raises:
        ShuttingDownError: the server takes nothing new, and all that came is answered.
    """
    places = asyncio.Semaphore(TOGETHER)
    ready: asyncio.Queue[pb.GenerateManyResponse] = asyncio.Queue()
    under_way: set[asyncio.Task[None]] = set()

    async def work(item: pb.GenerateManyRequest) -> None:
        found = await _answered(item, _refuse if stopping.is_set() else answer)
        told(_code(found.error.code).name, found.error.reason or "OK")
        ready.put_nowait(found)

    async def read() -> None:
        async for item in requests:
            await places.acquire()
            task = asyncio.create_task(work(item))
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    reader, stopped = asyncio.create_task(read()), asyncio.create_task(stopping.wait())
    try:
        while not (reader.done() and not under_way and ready.empty()):
            getter = asyncio.create_task(ready.get())
            try:
                waiting = [task for task in (reader, stopped) if not task.done()]
                await asyncio.wait((getter, *waiting, *under_way), return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    reader.result()
                if getter.done():
                    yield getter.result()
                    places.release()
                elif stopping.is_set() and ready.empty() and not (under_way or reader.done()):
                    raise ShuttingDownError(STOPPING)
            finally:
                getter.cancel()
        reader.result()  # reading may have failed while the last answer was being sent
    finally:
        left = [reader, stopped, *under_way]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _code(number: int) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == number)


async def _refuse(request: pb.GenerateRequest) -> pb.GenerateResponse:  # noqa: ARG001
    raise ShuttingDownError(STOPPING)


async def _answered(item: pb.GenerateManyRequest, answer: Answer) -> pb.GenerateManyResponse:
    try:
        refuse_unknown_fields(item)
        if len(item.id) > LONGEST_ID:
            raise InvalidRequestError("id", f"{len(item.id)} characters are over the limit of {LONGEST_ID}")
        return pb.GenerateManyResponse(id=item.id, answer=await answer(item.request))
    except Exception as error:
        refused = refuse(error, item.request)
        about = pb.ItemError(
            code=refused.code.value[0],
            message=refused.message,
            reason=refused.reason,
            field=refused.field,
            retry_after_seconds=refused.retry_after,
        )
        return pb.GenerateManyResponse(id=item.id[:LONGEST_ID], error=about)
