"""Requests of a stream are answered at the same time, and sent in the order in which they came."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from serve.errors import ShuttingDownError
from serve.in_order import TOGETHER, answer_in_order
from tests.serve.running import PATIENCE


async def each(numbers: Sequence[int], then: Exception | None = None) -> AsyncIterator[int]:
    """Requests, and what comes after the last one."""
    for number in numbers:
        yield number
    if then is not None:
        raise then


async def collect(answers: AsyncIterator[int]) -> list[int]:
    async with asyncio.timeout(PATIENCE):
        return [answer async for answer in answers]


async def twice(number: int) -> int:
    return 2 * number


def test_the_last_may_be_ready_first() -> None:
    async def go() -> tuple[list[int], list[int]]:
        ended: list[int] = []
        ready = [asyncio.Event() for _ in range(4)]
        ready[3].set()

        async def answer(number: int) -> int:
            await ready[number].wait()
            ended.append(number)
            if number:
                ready[number - 1].set()
            return 2 * number

        return await collect(answer_in_order(each(range(4)), answer, asyncio.Event())), ended

    assert asyncio.run(go()) == ([0, 2, 4, 6], [3, 2, 1, 0])


def test_more_are_not_read_until_one_is_gone() -> None:
    async def go() -> list[int]:
        begun: list[int] = []

        async def answer(number: int) -> int:
            begun.append(number)
            return number

        answers = answer_in_order(each(range(3 * TOGETHER)), answer, asyncio.Event())
        found, most = [], 0
        async for one in answers:
            found.append(one)
            most = max(most, len(begun) - len(found))
        assert most <= TOGETHER
        return found

    assert asyncio.run(go()) == list(range(3 * TOGETHER))


def test_what_goes_wrong_with_reading_is_raised_after_what_came_is_answered() -> None:
    found: list[int] = []

    async def go() -> None:
        async for one in answer_in_order(each([1, 2], ValueError("no message")), twice, asyncio.Event()):
            found.append(one)  # noqa: PERF401  # what came before the error counts

    with pytest.raises(ValueError, match="no message"):
        asyncio.run(go())
    assert found == [2, 4]


def test_who_sends_nothing_does_not_keep_a_server_from_stopping() -> None:
    found: list[int] = []

    async def silent() -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    async def go() -> None:
        stopping = asyncio.Event()
        async for one in answer_in_order(silent(), twice, stopping):
            found.append(one)
            stopping.set()

    with pytest.raises(ShuttingDownError):
        asyncio.run(go())
    assert found == [2]


def test_who_goes_away_leaves_nothing_behind() -> None:
    async def go() -> set[int]:
        begun, given_up = asyncio.Semaphore(0), set[int]()

        async def answer(number: int) -> int:
            begun.release()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                given_up.add(number)
                raise
            return number

        call = asyncio.create_task(collect(answer_in_order(each([1, 2]), answer, asyncio.Event())))
        for _ in range(2):
            await begun.acquire()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return given_up

    assert asyncio.run(go()) == {1, 2}
